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
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from llada_kernels import IntervalMask
from llada_kernels.bench.memory import peak_allocation
from torch import Tensor

from bench import plain_model
from bench.step import GEMM_SIZE, MASK_TOKEN, Pair, benchmark_model, prepare, step_flops
from llada_mega.config.model import ModelConfig
from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import LinearSchedule
from llada_mega.models import run_batch

LENGTHS = (256, 512, 1024, 2048, 4096)
DOCUMENTS = (1, 2, 4, 8, 16, 32)
BLOCKS = (1, 4, 16, 32, 128, 512, 1024)
EXPERTS = (8, 16, 32, 64)
LENGTH, SHORT, BLOCK_SIZE = 1024, 512, 32
CPU = torch.device("cpu")


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
    """Alternates both steps and the matrix product ``repeats`` times, after a round that measures memory."""
    pair = prepare(config, sum(documents), block_size)
    ours, reference, flops = _steps(pair, documents, block_size)
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE)
    work: dict[str, Callable[[], object]] = {"ours": ours, "reference": reference, "gemm": lambda: left @ right}
    peaks = {}
    for name in ("ours", "reference"):
        peaks[name] = peak_allocation(work[name], CPU) / 2**20
        pair.forget_gradients()
    takes: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            start = time.process_time()
            function()
            takes[name].append(time.process_time() - start)
            pair.forget_gradients()
    seconds = {name: statistics.median(taken) for name, taken in takes.items()}
    floor = flops * seconds["gemm"] / (2 * GEMM_SIZE**3)
    return Point(
        axis, value, sum(documents), seconds["ours"], seconds["reference"], floor, peaks["ours"], peaks["reference"]
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


def _steps(
    pair: Pair, documents: Sequence[int], block_size: int
) -> tuple[Callable[[], float], Callable[[], float], int]:
    """Both steps on a sequence of several documents, and the FLOPs of its matrix products."""
    if len(documents) == 1:
        return pair.ours, pair.reference, pair.step_flops
    config, length = pair.config, sum(documents)
    tokens_L = torch.randint(MASK_TOKEN + 1, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    batch, both_halves = (_batch(tokens_L, documents, block_size, kept) for kept in ("needed", "all"))
    ids_S, positions_S = both_halves.input_ids_S[: 2 * length], both_halves.position_ids_S[: 2 * length]
    weights_L = torch.zeros(length)
    weights_L[batch.logit_rows_R[: batch.num_rows]] = batch.weights_R[: batch.num_rows]

    def ours() -> float:
        unplanned = IntervalMask(batch.mask.endpoints, batch.mask.total_k)
        loss = run_batch(pair.model, dataclasses.replace(batch, mask=unplanned)).loss_sum
        loss.backward()
        return loss.item()

    def reference() -> float:
        mask_SS = plain_model.dense_mask(documents, block_size)
        loss = plain_model.loss(pair.weights, config, ids_S, positions_S, mask_SS, tokens_L, weights_L)
        loss.backward()
        return loss.item()

    visible = IntervalMask.block_diffusion(documents, block_size).area()
    return ours, reference, step_flops(config, 2 * length, visible, batch.num_rows)


def _batch(tokens_L: Tensor, documents: Sequence[int], block_size: int, clean_tokens: str) -> Batch:
    supervised_L = torch.ones(len(tokens_L), dtype=torch.bool)
    return build_batch(
        [Sample(tokens_L, list(documents), [False] * len(documents), supervised_L, sample_index=0)],
        layout="bdlm",
        block_size=block_size,
        objective=DiffusionObjective("elbo", LinearSchedule()),
        schedule=LinearSchedule(),
        seed=1,
        mask_token_id=MASK_TOKEN,
        pad_token_id=0,
        t_min=0.4,
        t_max=0.6,
        clean_tokens=clean_tokens,
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
