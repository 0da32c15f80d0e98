"""How the cost of a step grows with sequence length, documents, block size and experts, ours beside the plain one.

``python -m bench.scaling`` takes the model of :mod:`bench.step` and changes one thing at a time. Both implementations
take turns in one process; seconds are CPU seconds of one forward and backward pass of one sequence. The floor is what
the matrix products over all 2L positions take at the speed of a large one, measured in the same turns; a step that
leaves positions out (clean copies that nobody sees) may be faster. Peaks are allocations beyond weights and batch.

Legend: L tokens of the sequence, 2L positions [noisy ; clean].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.step import GEMM_SIZE, benchmark_model, peaks_mib, prepare, take_turns
from llada_mega.config.model import ModelConfig

LENGTHS = (256, 512, 1024, 2048, 4096)
DOCUMENTS = (1, 2, 4, 8, 16, 32)
BLOCKS = (1, 4, 16, 32, 128, 512, 1024)
EXPERTS = (8, 16, 32, 64)
LENGTH, SHORT, BLOCK_SIZE = 1024, 512, 32
COMPARED = ("ours", "reference")


@dataclass(frozen=True)
class Point:
    """One size: CPU seconds and peak MiB of a step, seconds at the floor."""

    axis: str
    value: int
    tokens: int
    seconds: float
    reference_seconds: float
    floor_seconds: float
    peak_mib: float
    reference_peak_mib: float


def measure(
    axis: str, value: int, config: ModelConfig, documents: Sequence[int], block_size: int, repeats: int
) -> Point:
    """Peak memory, then both steps and the matrix product in turns."""
    pair = prepare(config, documents, block_size)
    peaks, seconds = peaks_mib(pair, COMPARED), take_turns(pair, repeats, names=COMPARED)
    floor = pair.step_flops * seconds["gemm"] / (2 * GEMM_SIZE**3)
    return Point(
        axis, value, pair.num_tokens, seconds["ours"], seconds["reference"], floor, peaks["ours"], peaks["reference"]
    )


def sweep(repeats: int, say: Callable[[str], None] = print) -> list[Point]:
    """All four axes."""
    model = benchmark_model()
    cases: list[tuple[str, int, ModelConfig, list[int], int]] = [
        *(("tokens", length, model, [length], BLOCK_SIZE) for length in LENGTHS),
        *(("documents", count, model, [LENGTH // count] * count, BLOCK_SIZE) for count in DOCUMENTS),
        *(("block size", size, model, [LENGTH], size) for size in BLOCKS),
        *(("experts", count, _with_experts(model, count), [SHORT], BLOCK_SIZE) for count in EXPERTS),
    ]
    points = []
    for axis, value, config, documents, block_size in cases:
        points.append(measure(axis, value, config, documents, block_size, repeats))
        say(line(points[-1]))
    return points


def line(point: Point) -> str:
    """The point in words."""
    return (
        f"{point.axis:11}{point.value:6}: {point.tokens / point.seconds:6.0f} tokens/CPU-second, plain "
        f"{point.tokens / point.reference_seconds:6.0f} ({point.reference_seconds / point.seconds:4.1f} times), "
        f"floor {point.tokens / point.floor_seconds:6.0f}; peak {point.peak_mib:5.0f} MiB, plain "
        f"{point.reference_peak_mib:6.0f}"
    )


def _with_experts(model: ModelConfig, count: int) -> ModelConfig:
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=count))


def main() -> None:
    """Print the points; write them as JSON with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="steps of each, alternating")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = sweep(options.repeats)
    if options.output is not None:
        options.output.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")


if __name__ == "__main__":
    main()
