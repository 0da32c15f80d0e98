"""Peak memory of real steps, every component measured and beside what `llada-mega plan` says.

``python -m bench.memory`` trains two steps of each of ``RUNS`` on the CPU and follows all live tensor storages through
the second, when the optimizer has its state. Batches are random tokens, one document a sample.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from bench.live_memory import LiveMemory
from llada_mega.config.compose import compose
from llada_mega.config.data import Corpus
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.context import length_multiple, shard_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import LinearSchedule
from llada_mega.models import BlockDiffusionModel
from llada_mega.models.embedding import NoisyEmbedding
from llada_mega.models.experts import Routes
from llada_mega.models.norm import RMSNorm
from llada_mega.models.router import BalancedRouter
from llada_mega.models.self_attention import IntervalSelfAttention
from llada_mega.parallel import destroy, initialize
from llada_mega.parallel.capabilities import choose_software
from llada_mega.planning.activations import Sizes, behind_attention
from llada_mega.planning.memory import COMPONENTS, Copies, peak_memory, sizes_of
from llada_mega.planning.share import share_of_stage
from llada_mega.training.run import build_step
from llada_mega.training.step import TrainStep

# The first class that a module is an instance of gives it its component; other modules belong to what is around them.
COMPONENT_OF: dict[type, str] = {
    NoisyEmbedding: "embedding",
    RMSNorm: "norms",
    BalancedRouter: "router",
    MoELayer: "experts",
    SequentialMLP: "experts",  # in a MoELayer that is recomputed, which is not called then
    MLP: "feed-forward",  # a dense network, or the shared expert inside a MoELayer
    IntervalSelfAttention: "attention",
    TransformerLayer: "residual stream",
    BlockDiffusionModel: "logits",
}
MIB = 2**20

MOE = ("model=tiny_ling", "model.num_layers=4", "model.vocab_size=2048", "model.mask_token_id=3")
DENSE = (
    "model=tiny",
    "model.num_layers=6",
    "model.hidden_size=256",
    "model.head_dim=64",
    "model.ffn_hidden_size=768",
    "model.vocab_size=8192",
    "model.mask_token_id=3",
)
SELECTIVE = ("parallel.recompute=selective",)


def run_of(length: int, samples: int, block_size: int, *others: str) -> tuple[str, ...]:
    """Overrides of a run with micro-batches of ``samples`` samples."""
    stage = f"curriculum.stages=[{{block_size: {block_size}, tokens: 1000000}}]"
    batch = (f"trainer.global_batch_size={samples}", f"trainer.micro_batch_size={samples}")
    return (f"data.sequence_length={length}", stage, *batch, *others)


RUNS = {
    "tiny dense": run_of(64, 1, 64, "model=tiny"),
    "dense, tied tables, bf16": run_of(512, 2, 32, *DENSE, "trainer.dtype=bfloat16", "model.tie_embeddings=true"),
    "dense, MDLM": run_of(512, 4, 512, *DENSE),
    "dense, two chunks of logits": run_of(512, 8, 512, *DENSE, "model.num_layers=2"),
    "dense, full recomputation": run_of(512, 4, 512, *DENSE, "parallel.recompute=full"),
    "experts": run_of(512, 1, 32, *MOE),
    "experts, bf16": run_of(1024, 2, 32, *MOE, "trainer.dtype=bfloat16"),
    "experts, full recomputation": run_of(1024, 2, 32, *MOE, "parallel.recompute=full"),
    "experts, attention again": run_of(1024, 2, 1024, *MOE, *SELECTIVE, "parallel.recompute_modules=[core_attn]"),
    "experts, dense network again": run_of(1024, 2, 32, *MOE, *SELECTIVE, "parallel.recompute_modules=[mlp]"),
    "experts again": run_of(1024, 2, 32, *MOE, *SELECTIVE, "parallel.recompute_modules=[moe]"),
    "experts, vocabulary of 49153": run_of(512, 1, 32, "model=tiny_ling"),
    "SmolLM2-135M": run_of(128, 2, 8, "model=smollm2_135m"),
}


@dataclass(frozen=True)
class Measured:
    """Bytes at the largest moment of a step, by component, as tracked and as planned."""

    measured: dict[str, float]
    planned: dict[str, float]
    moment: str

    @property
    def ratio(self) -> float:
        """Planned over measured."""
        return sum(self.planned.values()) / sum(self.measured.values())

    def worst(self) -> tuple[str, float]:
        """The component that is furthest off, and by which share of the measured peak."""
        peak = sum(self.measured.values())
        names = {*self.measured, *self.planned}
        off = {name: (self.planned.get(name, 0) - self.measured.get(name, 0)) / peak for name in names}
        name = max(off, key=lambda name: abs(off[name]))
        return name, off[name]


def measure(overrides: Sequence[str]) -> Measured:
    """Two steps of a run on this rank, the second one tracked; process groups are made and left again."""
    config = compose(Config, overrides)
    config.data.train = [Corpus("random tokens")]
    groups = initialize(config.parallel, seed=config.seed)
    try:
        validate(config, groups.world_size)
        dtype = getattr(torch, config.trainer.dtype)
        software = choose_software(config.model, config.parallel, dtype)
        step = build_step(config, groups, None, software, random_weights=True)
        count = config.trainer.global_batch_size // (config.trainer.micro_batch_size * groups.dp.size())
        first = groups.dp.rank() * count
        batches = [random_batch(config, first + index) for index in range(count)]
        take_step(step, batches)
        counts = count_routes(step)
        tracker = track(step, batches)
        mine = [shard_batch(batch, groups.cp.rank(), groups.cp.size(), work_tile=step.work_tile) for batch in batches]
        positions, rows = max(len(part.input_ids_S) for part in mine), max(len(part.logit_rows_R) for part in mine)
        share = share_of_stage(config.model, config.parallel, groups.pp.rank())
        balanced = sizes_of(config.model, config.parallel, positions, rows, dtype)
        rank_load, fullest_expert = expert_load(config, share.layers, balanced, list(counts.values()))
        sizes = sizes_of(
            config.model,
            config.parallel,
            positions,
            rows,
            dtype,
            expert_load=rank_load,
            fullest_expert=fullest_expert,
        )
        copies = Copies.of(config.parallel, groups.world_size)
        planned = peak_memory(config.model, config.parallel, share, copies, sizes, count)
        return Measured(
            {name: float(size) for name, size in tracker.at_peak.items()}, planned.components, planned.moment
        )
    finally:
        destroy()


def track(step: TrainStep, batches: list[Batch]) -> LiveMemory:
    """One step under a tracker that knows what was there before."""
    modules = [module for model in step.bare_models for module in model.modules()]
    kinds = {module: component_of(module) for module in modules}
    tracker = LiveMemory({module: kind for module, kind in kinds.items() if kind is not None})
    tracker.hold("parameters", (parameter for model in step.bare_models for parameter in model.parameters()))
    buffers = [buffer for chunk in step.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    tracker.hold("gradients", (buffer.grad_data for buffer in buffers))
    for optimizer in getattr(step.optimizer, "chained_optimizers", [step.optimizer]):
        for parameter, state in optimizer.optimizer.state.items():
            tracker.hold("optimizer", [parameter, *filter(torch.is_tensor, state.values())])
    tracker.hold("batch", (value for batch in batches for value in vars(batch).values() if torch.is_tensor(value)))
    with tracker:
        take_step(step, batches)
    return tracker


def count_routes(step: TrainStep) -> dict[torch.nn.Module, list[list[int]]]:
    """The routes that come to each expert of a layer, a list for each forward pass that is yet to come."""
    counts: dict[torch.nn.Module, list[list[int]]] = {}

    def count(experts: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        arrived = arguments[1].counts if isinstance(arguments[1], Routes) else arguments[1].tolist()
        counts.setdefault(experts, []).append(arrived)

    for model in step.bare_models:
        for module in model.modules():
            if isinstance(module, SequentialMLP):
                module.register_forward_pre_hook(count)
    return counts


def expert_load(
    config: Config, layers: Sequence[int], balanced: Sizes, counts: list[list[list[int]]]
) -> tuple[float, float]:
    """What comes to this rank and to its fullest expert, over what did if all experts were chosen alike.

    Args:
        layers: of this rank.
        balanced: sizes of the largest micro-batch with a load of 1.
        counts: routes by layer, forward pass and expert.
    """
    tokens = [
        behind_attention(config.model, config.parallel, layer, balanced).tokens
        for layer in layers
        if config.model.is_moe_layer(layer)
    ]
    if not tokens:
        return 1.0, 1.0
    rank = sum(max(sum(one) for one in passes) for passes in counts) / (sum(tokens) * balanced.routes_a_token)
    expert = max(max(max(one) for one in passes) for passes in counts) / (max(tokens) * balanced.expert_share)
    return rank, expert


def component_of(module: torch.nn.Module) -> str | None:
    """Its own component; None for the one of the module around it."""
    return next((name for kind, name in COMPONENT_OF.items() if isinstance(module, kind)), None)


def take_step(step: TrainStep, batches: list[Batch]) -> None:
    """One step that is always accepted."""
    step(batches, learning_rate=1e-4, embedding_noise_std=0.0, accept=lambda measured: True)


def random_batch(config: Config, number: int) -> Batch:
    """A micro-batch of random tokens, about half of them masked."""
    length, size = config.data.sequence_length, config.trainer.micro_batch_size
    generator = torch.Generator().manual_seed(number)
    block_size = config.curriculum.stages[0].block_size
    everything = torch.ones(length, dtype=torch.bool)
    samples = [
        Sample(
            torch.randint(4, config.model.vocab_size - 1, (length,), generator=generator),
            [length],
            [False],
            everything,
            sample_index=number * size + index,
        )
        for index in range(size)
    ]
    assert config.model.mask_token_id is not None  # validated
    return build_batch(
        samples,
        layout="bdlm" if block_size < length else "mdlm",
        block_size=block_size,
        objective=DiffusionObjective("elbo", LinearSchedule()),
        schedule=LinearSchedule(),
        seed=1,
        mask_token_id=config.model.mask_token_id,
        pad_token_id=0,
        t_min=0.4,
        t_max=0.6,
        length_multiple=length_multiple(config.parallel),
    )


def main() -> int:
    """Print a table in Markdown; write all components as JSON with ``--output``."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    shown = [name for name in COMPONENTS if name not in ("batch", "outside modules")]
    print(f"| run | peak, MiB | plan | largest at | {' | '.join(shown)} |\n|{'---|' * (len(shown) + 4)}")
    for name, overrides in RUNS.items():
        found = measure(overrides)
        results[name] = asdict(found) | {"ratio": found.ratio}
        peak = sum(found.measured.values()) / MIB
        cells = (f"{found.measured.get(part, 0) / MIB:.1f}/{found.planned.get(part, 0) / MIB:.1f}" for part in shown)
        print(f"| {name} | {peak:.1f} | {found.ratio:.3f} | {found.moment} | {' | '.join(cells)} |", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
