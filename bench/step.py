"""Forward and backward of one training sequence on one CPU core, ours against the step of published trainers.

``python -m bench.step`` lets this model, GLM-4-MoE of transformers (:mod:`bench.published_model`) and the tidier
:mod:`bench.plain_model` take turns with the same weights and tokens, in one process, and counts CPU seconds, so that a
busy machine disturbs neither the ratios nor the share of the floor. The floor is what the matrix products of the step
alone take at the speed of a large matrix product, measured between the steps. The plain model in float64 is the oracle:
loss and all gradients are compared with it.

With ``--threads 2`` all of it runs on one core and then on two, wall time is counted, and the step's gain is set
against that of the large product.

A step starts from token ids, makes its attention mask (a training run sees a new one in every batch) and ends with all
gradients in place; the optimizer is left out.

Legend: L tokens of the sequence, 2L positions [noisy ; clean].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llada_kernels import IntervalMask
from llada_kernels.bench.memory import peak_allocation
from torch import Tensor

from bench import plain_model, published_model
from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.context import length_multiple, logit_row_multiple
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import LinearSchedule
from llada_mega.models import BlockDiffusionModel, build_model, run_batch
from llada_mega.models.hf_mapping import local_to_hf

MASK_TOKEN = 3
LENGTH, BLOCK_SIZE = 512, 32
GEMM_SIZE = 1536
CPU = torch.device("cpu")
IMPLEMENTATIONS = ("ours", "reference", "published")  # fields of Pair


@dataclass(frozen=True)
class Report:
    """One run. Seconds are medians of CPU time; peaks are allocations of a step beyond weights and batch."""

    tokens_per_cpu_second: float
    published_tokens_per_cpu_second: float
    reference_tokens_per_cpu_second: float
    published_ratio: float
    ratio: float
    floor_seconds: float
    share_of_floor: float
    gemm_gflops: float
    step_gflop: float
    peak_mib: float
    published_peak_mib: float
    reference_peak_mib: float
    loss_difference: float
    gradient_difference: float
    worst_gradient: str
    reference_gradient_difference: float


class Differences(NamedTuple):
    """From float64, relative; of a gradient the largest one, by its tensor's largest entry, and whose it is."""

    loss: float
    gradient: float
    worst: str
    reference_gradient: float


@dataclass
class Pair:
    """Three implementations of one step. Each leaves its gradients behind and returns the summed loss."""

    config: ModelConfig
    model: BlockDiffusionModel
    weights: dict[str, Tensor]
    ours: Callable[[], float]
    reference: Callable[[], float]
    exact: Callable[[], tuple[float, dict[str, Tensor]]]  # loss and gradients in float64
    published: Callable[[], float]
    published_model: torch.nn.Module
    num_tokens: int
    step_flops: int

    def forget_gradients(self) -> None:
        """As after an optimizer step."""
        for tensor in (*self.model.parameters(), *self.weights.values(), *self.published_model.parameters()):
            tensor.grad = None


def benchmark_model() -> ModelConfig:
    """A Ling 2.0 of 13 million parameters."""
    moe = MoEConfig(16, 4, 4, 2, expert_ffn_hidden_size=128, shared_expert_ffn_hidden_size=128, first_dense_layers=1)
    return ModelConfig(
        architecture="llada2_moe",
        num_layers=8,
        hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=64,
        ffn_hidden_size=512,
        vocab_size=1024,
        qk_norm=True,
        rotary_percent=0.5,
        mask_token_id=MASK_TOKEN,
        moe=moe,
    )


def prepare(config: ModelConfig, documents: Sequence[int], block_size: int) -> Pair:
    """One sequence of ``documents`` (lengths) of random tokens, about half masked; weights drawn from a fixed seed."""
    length = sum(documents)
    model = build_model(config, seed=0)
    model.train()
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    weights = _renamed(config, state)
    for name, weight in weights.items():
        weight.requires_grad_(not name.endswith("expert_bias"))
    tokens_L = torch.randint(MASK_TOKEN + 1, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    batch, both_halves = (_batch(tokens_L, documents, block_size, kept) for kept in ("needed", "all"))
    ids_S, positions_S = both_halves.input_ids_S[: 2 * length], both_halves.position_ids_S[: 2 * length]
    weights_L = torch.zeros(length)
    weights_L[batch.logit_rows_R[: batch.num_rows]] = batch.weights_R[: batch.num_rows]

    def ours() -> float:
        unplanned = IntervalMask(batch.mask.endpoints, batch.mask.total_k)
        loss = run_batch(model, dataclasses.replace(batch, mask=unplanned)).loss_sum
        loss.backward()
        return loss.item()

    def plain(parameters: dict[str, Tensor]) -> Tensor:
        mask_SS = plain_model.dense_mask(documents, block_size)
        loss = plain_model.loss(parameters, config, ids_S, positions_S, mask_SS, tokens_L, weights_L)
        loss.backward()
        return loss

    def reference() -> float:
        return plain(weights).item()

    def exact() -> tuple[float, dict[str, Tensor]]:
        wide = {name: weight.detach().double().requires_grad_(weight.requires_grad) for name, weight in weights.items()}
        loss = plain(wide).item()
        learned = {name: weight for name, weight in wide.items() if weight.requires_grad}
        # an expert that no token chose has no gradient
        return loss, {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in learned.items()}

    theirs = published_model.build(config, {name: weight.detach() for name, weight in weights.items()})

    def published() -> float:
        mask_SS = plain_model.dense_mask(documents, block_size)
        loss = published_model.loss(theirs, ids_S, positions_S, mask_SS, tokens_L, weights_L)
        loss.backward()
        return loss.item()

    visible = IntervalMask.block_diffusion(documents, block_size).area()
    flops = step_flops(config, 2 * length, visible, batch.num_rows)
    return Pair(config, model, weights, ours, reference, exact, published, theirs, length, flops)


def step_flops(config: ModelConfig, positions: int, visible_pairs: int, logit_rows: int) -> int:
    """FLOPs of the matrix products of one forward and backward pass, 2 for a multiply-add.

    A product C = A B has two in the backward pass, dA = dC B' and dB = A' dC, each as large: 3 in all. That holds for
    the scores and the outputs of attention, over visible pairs only, as for linear layers. Nothing is counted for what
    an implementation computes again, nor for routing beyond its matrix, norms, softmax and embeddings.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    groups = (config.num_query_groups or config.num_attention_heads) * config.head_dim
    products = logit_rows * hidden * config.vocab_size
    for layer in range(config.num_layers):
        products += positions * hidden * (heads + 2 * groups) + positions * heads * hidden
        products += 2 * visible_pairs * heads
        if config.is_moe_layer(layer):
            moe = config.moe
            width = moe.top_k * moe.expert_ffn_hidden_size + moe.shared_expert_ffn_hidden_size
            products += positions * hidden * moe.num_experts
        else:
            width = config.ffn_hidden_size
        products += positions * 3 * hidden * width  # gate, up, down
    return 2 * 3 * products


def compare(pair: Pair) -> Differences:
    """Ours and the plain model in float32 against the plain model in float64."""
    pair.forget_gradients()
    loss, (expected, exact) = pair.ours(), pair.exact()
    pair.reference()
    gradients = {name: p.grad for name, p in pair.model.named_parameters() if p.grad is not None}
    routers = {name: b for name, b in pair.model.named_buffers() if name.endswith("expert_bias")}
    ours = {name: g for name, g in _renamed(pair.config, {**gradients, **routers}).items() if name in exact}
    theirs = {name: weight.grad for name, weight in pair.weights.items() if weight.grad is not None}

    def differences(found: Mapping[str, Tensor]) -> dict[str, float]:
        scales = {name: float(exact[name].abs().max()) or 1.0 for name in found}
        return {name: float((grad - exact[name]).abs().max()) / scales[name] for name, grad in found.items()}

    mine, plain = differences(ours), differences(theirs)
    worst = max(mine, key=lambda name: mine[name])
    pair.forget_gradients()
    return Differences(abs(loss - expected) / abs(expected), mine[worst], worst, max(plain.values()))


def take_turns(
    pair: Pair, repeats: int, clock: Callable[[], float] = time.process_time, names: Sequence[str] = IMPLEMENTATIONS
) -> dict[str, float]:
    """Median seconds of a step by each of ``names`` and of the large product, after a round that is not counted."""
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE)
    work = {**{name: getattr(pair, name) for name in names}, "gemm": lambda: left @ right}
    takes: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, function in work.items():
            start = clock()
            function()
            takes[name].append(clock() - start)
            pair.forget_gradients()
    return {name: statistics.median(taken[1:]) for name, taken in takes.items()}


def peaks_mib(pair: Pair, names: Sequence[str] = IMPLEMENTATIONS) -> dict[str, float]:
    """Peak of the allocations in a step by each of ``names``."""
    peaks = {}
    for name in names:
        peaks[name] = peak_allocation(getattr(pair, name), CPU) / 2**20
        pair.forget_gradients()
    return peaks


def measure(pair: Pair, repeats: int) -> Report:
    """Speed on one core, memory and differences."""
    length, seconds = pair.num_tokens, take_turns(pair, repeats)
    rate = 2 * GEMM_SIZE**3 / seconds["gemm"]
    floor = pair.step_flops / rate
    peaks = peaks_mib(pair)
    differences = compare(pair)
    return Report(
        tokens_per_cpu_second=length / seconds["ours"],
        published_tokens_per_cpu_second=length / seconds["published"],
        reference_tokens_per_cpu_second=length / seconds["reference"],
        published_ratio=seconds["published"] / seconds["ours"],
        ratio=seconds["reference"] / seconds["ours"],
        floor_seconds=floor,
        share_of_floor=floor / seconds["ours"],
        gemm_gflops=rate / 1e9,
        step_gflop=pair.step_flops / 1e9,
        peak_mib=peaks["ours"],
        published_peak_mib=peaks["published"],
        reference_peak_mib=peaks["reference"],
        loss_difference=differences.loss,
        gradient_difference=differences.gradient,
        worst_gradient=differences.worst,
        reference_gradient_difference=differences.reference_gradient,
    )


def scaling(pair: Pair, repeats: int, threads: int) -> dict[str, float]:
    """How many times as fast each of the four is on ``threads`` cores as on one, by wall time."""
    seconds = {}
    for count in (1, threads):
        torch.set_num_threads(count)
        seconds[count] = take_turns(pair, repeats, time.perf_counter)
    return {name: seconds[1][name] / seconds[threads][name] for name in seconds[1]}


def main() -> int:
    """Print the report; write it as JSON with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="steps of each, alternating")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of the sequence")
    parser.add_argument("--threads", type=int, default=1, help="more than one: what a step gains from so many cores")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = prepare(benchmark_model(), [options.length], BLOCK_SIZE)
    if options.threads > 1:
        gains = scaling(pair, options.repeats, options.threads)
        print(
            f"{options.threads} threads are {gains['ours']:.2f} times as fast as one, a large matrix product "
            f"{gains['gemm']:.2f} times: {gains['ours'] / gains['gemm']:.2f} of its gain"
        )
        return _write(options.output, gains)
    report = measure(pair, options.repeats)
    rows = (
        ("transformers, loop over experts", report.published_tokens_per_cpu_second, report.published_peak_mib),
        ("plain PyTorch", report.reference_tokens_per_cpu_second, report.reference_peak_mib),
        ("llada-mega", report.tokens_per_cpu_second, report.peak_mib),
    )
    print(f"{'':32}{'tokens/CPU-second':>20}{'ms a step':>12}{'peak MiB':>12}")
    for name, rate, peak in rows:
        print(f"{name:32}{rate:20.0f}{1e3 * options.length / rate:12.0f}{peak:12.0f}")
    print(
        f"{report.published_ratio:.2f} times as fast as transformers with "
        f"{report.peak_mib / report.published_peak_mib:.0%} of its memory, {report.ratio:.2f} times as fast as plain "
        f"PyTorch; {report.share_of_floor:.0%} of the floor, {1e3 * report.floor_seconds:.0f} ms for "
        f"{report.step_gflop:.1f} GFLOP at {report.gemm_gflops:.0f} GFLOP/s; from float64 the "
        f"loss differs by {report.loss_difference:.1e}, gradients by up to {report.gradient_difference:.1e} of their "
        f"largest entry ({report.worst_gradient}), plain PyTorch's by {report.reference_gradient_difference:.1e}"
    )
    return _write(options.output, asdict(report))


def _write(path: Path | None, report: dict[str, Any]) -> int:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


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
        length_multiple=length_multiple(ParallelConfig(), CPU),
        row_multiple=logit_row_multiple(ParallelConfig(), CPU),
    )


def _renamed(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies under Hugging Face names."""
    return dict(local_to_hf(config, {name: tensor.detach() for name, tensor in tensors.items()}))


if __name__ == "__main__":
    raise SystemExit(main())
