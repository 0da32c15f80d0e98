"""The first hour on a GPU, ``make gpu-first``: everything that could not be tried without one, into one page.

Each step is a program of its own with a time limit; together they take less than 40 minutes. Its result is appended to
``docs/gpu_results.md`` as soon as it ends, under the date and the name of the GPU. What has succeeded is noted in
``build/gpu_first/state.json``, so that the same command goes on after an interruption, and repeats only what failed.
Another GPU or another commit starts anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_first"
PAGE = ROOT / "docs" / "gpu_results.md"
TE_TESTS = "tests/models/test_te_gpu.py"


@dataclass(frozen=True)
class Step:
    """One program of the hour.

    Attributes:
        name: of its log and in the state.
        title: on the page.
        arguments: what Python runs.
        minutes: after which it is ended.
        lines: how many of the last lines of its output go onto the page.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    minutes: float
    lines: int = 15


PYTEST = ("-m", "pytest", "-q", "-m", "gpu")
STEPS = (
    Step(
        "libraries",
        "Libraries of the attention backend cudnn",
        ("-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "--editable", ".[cudnn]"),
        minutes=4,
        lines=3,
    ),
    Step("doctor", "The machine", ("-m", "llada_mega", "doctor", "require=[CUDA,cuDNN,NCCL]"), minutes=1.5, lines=80),
    Step("tests", "GPU tests", (*PYTEST, "tests", f"--ignore={TE_TESTS}"), minutes=9),
    Step("te", "TransformerEngine's layers against the local ones", (*PYTEST, TE_TESTS), minutes=5),
    Step(
        "kernels",
        "Block attention",
        ("-m", "llada_kernels.bench", "--lengths", "4096", "--output", "build/gpu_first/kernels"),
        minutes=9,
        lines=120,
    ),
    Step("step", "One optimizer step at the shapes of the 16B model", ("-m", "bench.gpu_step"), minutes=9, lines=60),
)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: its words for the page, and whether it need not be repeated."""

    words: str
    succeeded: bool
    output: str


def gpu_name() -> str:
    """The first GPU with its memory. Raises RuntimeError, one line, where there is none."""
    import torch

    if not torch.cuda.is_available():
        lack = "is built without CUDA" if torch.version.cuda is None else "finds no GPU (look at nvidia-smi)"
        raise RuntimeError(f"this needs a CUDA device, and PyTorch {torch.__version__} {lack}")
    device = torch.cuda.get_device_properties(0)
    return f"{device.name}, {device.total_memory / 2**30:.0f} GiB"


def commit() -> str:
    """The commit of this checkout; "unknown" outside of git."""
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def run_step(step: Step, log: Path) -> Outcome:
    """Run one step, its output into ``log``; it and what it started are ended after ``step.minutes``."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "COLUMNS": "110",
        "PYTHONUNBUFFERED": "1",
    }
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *step.arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(step.minutes * 60)
            words = "passed" if status == 0 else f"FAILED with exit status {status}"
        except subprocess.TimeoutExpired:
            status, words = None, f"ENDED after its limit of {step.minutes:g} minutes"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    words += f", {time.monotonic() - started:.0f} s"
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return Outcome(words, status == 0, "\n".join(line.rstrip() for line in lines[-step.lines :]))


def finished_steps(state_path: Path, identity: dict[str, str]) -> list[str]:
    """Names of the steps that have succeeded on this GPU at this commit."""
    if not state_path.is_file():
        return []
    state = json.loads(state_path.read_text("utf-8"))
    return list(state["finished"]) if state["identity"] == identity else []


def run_steps(steps: Sequence[Step], identity: dict[str, str], work: Path = WORK, page: Path = PAGE) -> list[str]:
    """Run what has not succeeded yet and append each result to ``page``.

    Args:
        steps: in this order; a failure does not keep the others from running.
        identity: GPU and commit, which head the results and to which the state belongs.
        work: directory of the state and the logs.
        page: Markdown file.

    Returns:
        Names of the steps that failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    state_path = work / "state.json"
    finished = finished_steps(state_path, identity)
    heading = f"\n## {datetime.date.today()}, {identity['gpu']}\n\nCommit {identity['commit']}, `make gpu-first`.\n"
    failed = []
    for step in steps:
        if step.name in finished:
            print(f"{step.name}: has passed before")
            continue
        log = work / f"{step.name}.log"
        print(f"{step.name}: at most {step.minutes:g} minutes, output in {log}", flush=True)
        outcome = run_step(step, log)
        print(f"{step.name}: {outcome.words}", flush=True)
        with page.open("a", encoding="utf-8") as file:
            command = " ".join(["python", *step.arguments])
            file.write(
                f"{heading}\n### {step.title}: {outcome.words}\n\n`{command}`\n\n````text\n{outcome.output}\n````\n"
            )
        heading = ""
        if not outcome.succeeded:
            failed.append(step.name)
            continue
        finished.append(step.name)
        partial = state_path.with_suffix(".partial")
        partial.write_text(json.dumps({"identity": identity, "finished": finished}, indent=1) + "\n", "utf-8")
        partial.replace(state_path)
    return failed


def main() -> int:
    """0 when every step has succeeded, 1 when one has not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_first", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their limits, run nothing")
    if parser.parse_args().dry_run:
        for step in STEPS:
            print(f"{step.minutes:4g} minutes  python {' '.join(step.arguments)}")
        print(f"{sum(step.minutes for step in STEPS):4g} minutes at most")
        return 0
    try:
        gpu = gpu_name()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = run_steps(STEPS, {"gpu": gpu, "commit": commit()})
    print(f"results: {PAGE}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
