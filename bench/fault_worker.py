"""Runs ``llada-mega train`` with a planted fault; the program's own command line, so that nothing else is different.

    python -m bench.fault_worker train key=value ...   # starts two ranks of itself, as launch.nproc=2 would

The variable ``FAULT`` names what happens, as JSON: kind, step, rank, and the file that is told when it happened. Only
the first process with that file takes it; without the variable nothing happens. Every step takes ``PACE`` seconds
longer, so that what is aimed at a moment of a run hits it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

PROCESSES = 2
PACE = 0.1


def main(arguments: list[str]) -> int:
    """The launcher, or with RANK in the environment a rank."""
    if "RANK" not in os.environ:
        from llada_mega.commands.processes import start_processes

        run_dir = next(a.partition("=")[2] for a in arguments if a.startswith("run.dir="))
        return start_processes(PROCESSES, arguments, run_dir, command=[sys.executable, "-m", "bench.fault_worker"])
    from llada_mega.cli import main as llada_mega

    _plant(json.loads(os.environ.get("FAULT", "{}")))
    return llada_mega(arguments)


def _plant(fault: dict[str, Any]) -> None:
    import torch

    from llada_mega.data.batch import Batch
    from llada_mega.training import run
    from llada_mega.training.callback import Callback
    from llada_mega.training.state import StepMeasurement
    from llada_mega.training.trainer import Trainer

    class Fault(Callback):
        """The first callback of all: what it does comes before what the run does at the same hook."""

        name = "fault"

        def __init__(self) -> None:
            self.kind = fault.get("kind") if fault.get("rank") == int(os.environ["RANK"]) else None
            self.handle: Any = None

        def is_now(self, trainer: Trainer) -> bool:
            return trainer.state.step + 1 == fault["step"]

        def on_step_begin(self, trainer: Trainer) -> None:
            time.sleep(PACE)
            if self.kind == "slow" and 0 <= trainer.state.step + 1 - fault["step"] < fault["steps"]:
                if self.is_now(trainer):
                    happened()
                time.sleep(fault["seconds"])
            if self.kind == "nan" and self.is_now(trainer):
                happened()
                weight = trainer.step.bare_models[0].decoder.layers[0].mlp.linear_fc2.weight
                self.handle = weight.register_hook(lambda gradient: torch.full_like(gradient, math.nan))

        def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
            if self.kind == "hang" and self.is_now(trainer):
                happened()
                time.sleep(1e6)
            if self.kind == "freeze" and self.is_now(trainer):
                happened()
                os.kill(os.getpid(), signal.SIGSTOP)

        def accept_step(self, trainer: Trainer, measured: StepMeasurement) -> bool:
            if self.kind == "hang_after_backward" and self.is_now(trainer):
                happened()
                time.sleep(1e6)
            if self.kind == "kill_saving" and self.is_now(trainer):  # somewhere in the save at the end of this step
                threading.Timer(fault["seconds"], die).start()
            return True

    def happened() -> None:
        Path(fault["note"]).write_text(f"{time.time()}")

    def die() -> None:
        happened()
        os.kill(os.getpid(), signal.SIGKILL)

    build = run.build_callbacks
    run.build_callbacks = lambda *given: [Fault(), *build(*given)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
