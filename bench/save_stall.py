"""How long a checkpoint holds training up, beside the time to copy its bytes once.

``python -m bench.save_stall`` trains a dense model of 135 million parameters with and without asynchronous saves. A
save cannot take less of the training thread's time than a copy of weights and optimizer state, so the floor is their
bytes at the rate of a copy between two resident buffers, measured in the same process. Stall is the time in the
checkpoint's hook: the copy, and later giving the written checkpoint its name. What writing and checksums, in their
thread, take from the steps in the meantime is told apart from it. All by the wall clock; on a machine that does other
work, compare the CPU seconds, of the copy and of the training thread in the hook.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.corpus import prepare_corpus
from bench.observed_run import observe
from llada_mega.checkpoint.checkpoint import list_checkpoints

EVERY, SAVES, LENGTH = 10, 3, 32
COPY_BYTES = 2**28
MODEL = (
    "model=smollm2_135m",
    f"data.sequence_length={LENGTH}",
    "trainer.global_batch_size=1",
    "trainer.micro_batch_size=1",
    f"curriculum.stages=[{{name: only, block_size: 32, tokens: {LENGTH * (EVERY * SAVES + EVERY - 1)}}}]",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep_last=1",
)


@dataclass(frozen=True)
class SaveStall:
    """Seconds of wall time unless they are called CPU seconds. Lists have one value a save;
    ``lost_to_writing_seconds`` is what the steps up to the next save took more than the usual step."""

    mib: float
    copy_gib_per_second: float
    floor_seconds: float
    floor_cpu_seconds: float
    stall_seconds: list[float]
    stall_cpu_seconds: list[float]
    synchronous_seconds: list[float]
    step_seconds: float
    lost_to_writing_seconds: list[float]

    @property
    def limit_seconds(self) -> float:
        """One and a half copies and a tenth of a second."""
        return 1.5 * self.floor_seconds + 0.1

    @property
    def limit_cpu_seconds(self) -> float:
        """The same at the CPU time of a copy."""
        return 1.5 * self.floor_cpu_seconds + 0.1


def copy_rate(size: int = COPY_BYTES, repeats: int = 9) -> tuple[float, float]:
    """Bytes per second and per CPU-second of copying one resident buffer to another on this process's threads."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return size / statistics.median(seconds), size / statistics.median(cpu_seconds)


def measure(directory: Path) -> SaveStall:
    """Train twice below ``directory``."""
    overrides = [*prepare_corpus(directory / "corpus"), *MODEL]
    rate, cpu_rate = copy_rate()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        runs = {}
        for mode in ("true", "false"):
            runs[mode] = observe(Path(scratch) / mode, [*overrides, f"checkpoint.async={mode}"])
        newest = list_checkpoints(Path(scratch) / "true" / "checkpoints")[-1]
        size = sum(path.stat().st_size for path in newest.rglob("*.safetensors"))
    background, blocking = runs["true"], runs["false"]
    usual = statistics.median(blocking.step[1:])
    # A save begins after step 10, 20, ...; its name is given after one of the steps before the next one.
    spans = [slice(EVERY * (n + 1), EVERY * (n + 2) - 1) for n in range(SAVES)]
    return SaveStall(
        mib=size / 2**20,
        copy_gib_per_second=rate / 2**30,
        floor_seconds=size / rate,
        floor_cpu_seconds=size / cpu_rate,
        stall_seconds=[background.checkpoint[s.start - 1] + sum(background.checkpoint[s]) for s in spans],
        stall_cpu_seconds=[background.checkpoint_cpu[s.start - 1] + sum(background.checkpoint_cpu[s]) for s in spans],
        synchronous_seconds=[blocking.checkpoint[s.start - 1] for s in spans],
        step_seconds=usual,
        lost_to_writing_seconds=[sum(background.step[s]) - usual * len(background.step[s]) for s in spans],
    )


def text(result: SaveStall) -> str:
    """The result in lines."""

    def numbers(values: list[float]) -> str:
        return ", ".join(f"{value:.2f}" for value in values)

    return (
        f"{result.mib:.0f} MiB a checkpoint; copying: {result.copy_gib_per_second:.1f} GiB/s, so the floor is "
        f"{result.floor_seconds:.2f} s and the limit {result.limit_seconds:.2f} s\n"
        f"asynchronous saves stall training for {numbers(result.stall_seconds)} s, "
        f"synchronous ones for {numbers(result.synchronous_seconds)} s\n"
        f"in CPU seconds: {numbers(result.stall_cpu_seconds)}, floor {result.floor_cpu_seconds:.2f}, "
        f"limit {result.limit_cpu_seconds:.2f}\n"
        f"while one is written, steps of {result.step_seconds:.2f} s lose "
        f"{numbers(result.lost_to_writing_seconds)} s in all"
    )


def main() -> None:
    """Print the result; write it as JSON with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("build/bench"), help="corpus and runs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    result = measure(options.directory.resolve())
    print(text(result))
    if options.output is not None:
        options.output.write_text(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
