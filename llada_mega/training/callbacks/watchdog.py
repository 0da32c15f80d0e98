"""Ends a run that has come to a standstill, and says where every rank stood.

A rank that hangs takes all others with it: they wait for it in a collective, silently, until a timeout that says
nothing about the cause. So a thread of every rank looks whether the loop still moves. When it does not, each rank
leaves its stacks in ``RUN/logs/hang``, and each reads what the others have left: a rank that is behind them, or that
leaves nothing, is the one they wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _distributed_c10d

from llada_mega.checkpoint.directory import write_json
from llada_mega.training.callback import Callback

if TYPE_CHECKING:
    from llada_mega.training.trainer import Trainer

SETTLE_SECONDS = 10.0  # for the ranks that notice last to leave their stacks
# Frames that wait for other ranks. A GPU's host waits elsewhere, where it reads a result.
_WAITS = ("torch/distributed/", "megatron/core/distributed/", "megatron/core/pipeline_parallel/p2p")
_LIBRARIES = ("<", *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")))


@dataclass(frozen=True, order=True)
class Place:
    """How far a rank has come; a smaller place is behind. Of equal ones, who does not wait for others is behind."""

    step: int
    hooks: int  # of the loop, in this process
    waits: bool
    where: str = ""


class Watchdog(Callback):
    """Watches the loop from a thread; every hook is a sign of life.

    Args:
        run_dir: whose ``logs/hang`` takes the stacks.
        rank, world_size: of this process.
        patience: seconds without a sign of life.
        end: is told what to say of the run and ends the process; it is called in the thread.
    """

    name = "watchdog"

    def __init__(self, run_dir: Path, rank: int, world_size: int, patience: float, end: Callable[[str], None]) -> None:
        self._directory = run_dir / "logs" / "hang"
        self._rank, self._world_size, self._patience, self._end = rank, world_size, patience, end
        self._settle = min(SETTLE_SECONDS, patience / 2)
        self._step = self._hooks = 0
        self._last_sign = time.monotonic()
        self._main_thread = threading.main_thread().ident
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def on_train_begin(self, trainer: Trainer) -> None:
        _place_file(self._directory, self._rank).unlink(missing_ok=True)
        self._sign(trainer)
        self._thread.start()

    def on_stage_begin(self, trainer: Trainer, stage: Any) -> None:
        self._sign(trainer)

    def on_step_begin(self, trainer: Trainer) -> None:
        self._sign(trainer)

    def on_batches(self, trainer: Trainer, batches: Any) -> None:
        self._sign(trainer)

    def accept_step(self, trainer: Trainer, measured: Any) -> bool:
        self._sign(trainer)
        return True

    def on_step_end(self, trainer: Trainer, measured: Any, applied: bool) -> None:
        self._sign(trainer)

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._sign(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self.close()  # the run is saved; what is done with its checkpoints now may take its time

    def on_stop(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        # Once stacks are written the run has failed of the standstill, not of what follows: a rank that ends takes the
        # connections of the others with it, and their errors must not hide the cause. The thread ends the process.
        if self._thread.is_alive():
            self._thread.join()

    def _sign(self, trainer: Trainer) -> None:
        self._step, self._last_sign = trainer.state.step + 1, time.monotonic()
        self._hooks += 1

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._patience / 10)):
            if time.monotonic() - self._last_sign < self._patience:
                continue
            self._leave_stacks()
            self._leave_collectives()
            time.sleep(self._settle)
            self._end(self._report())
            return

    def _leave_stacks(self) -> None:
        frame = sys._current_frames().get(self._main_thread or 0)
        self._directory.mkdir(parents=True, exist_ok=True)
        place = Place(self._step, self._hooks, *_describe(frame))
        stacks = self._directory / f"rank_{self._rank:04d}.txt"
        with stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_json(_place_file(self._directory, self._rank), asdict(place))

    def _leave_collectives(self) -> None:
        """What PyTorch's flight recorder knows of NCCL, for its ``torchfrtrace``. Comes last: it may hang too."""
        dump = getattr(_distributed_c10d, "_dump_nccl_trace", None)  # a PyTorch without NCCL has none
        if dump is not None and torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError, OSError):
                (self._directory / f"nccl_trace_rank_{self._rank}").write_bytes(dump())

    def _report(self) -> str:
        places: list[Place | None] = []
        for rank in range(self._world_size):
            try:
                places.append(Place(**json.loads(_place_file(self._directory, rank).read_text())))
            except (OSError, ValueError, TypeError):
                places.append(None)
        return f"no progress for {self._patience:g} s; {late_ranks(places)}; stacks of all ranks: {self._directory}"


def late_ranks(places: Sequence[Place | None]) -> str:
    """Which rank the others wait for, in words. None: the rank has left nothing."""
    silent = [rank for rank, place in enumerate(places) if place is None]
    if silent:
        return f"{_ranks(silent)} did not answer (stopped, dead, or cut off)"
    known = [place for place in places if place is not None]
    keys = [(place.step, place.hooks, place.waits) for place in known]
    behind = [rank for rank, key in enumerate(keys) if key == min(keys)]
    if len(behind) == len(keys):
        return f"all ranks are at step {known[0].step}, in {known[0].where}"
    first = known[behind[0]]
    return f"{_ranks(behind)} came no further than {first.where} in step {first.step}, the others wait"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _place_file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:04d}.json"


def _describe(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack waits for other ranks, and the innermost of its frames that no library knows."""
    waits, where = False, ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        waits |= any(part in path.as_posix() for part in _WAITS)
        if not where and ("llada_mega" in path.parts or not str(path).startswith(_LIBRARIES)):
            where = f"{path.name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return waits, where or "a library"
