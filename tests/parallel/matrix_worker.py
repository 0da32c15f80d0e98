"""Five optimizer steps of a tiny model under a layout, compared with what one process saved; runs on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from llada_mega.config.run import ParallelConfig
from llada_mega.config.training import OptimizerConfig
from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import LinearSchedule
from llada_mega.parallel import ParallelGroups, cpu_runtime, initialize
from tests.models.helpers import MASK_ID, dense_config, moe_config

cpu_runtime.install()

LENGTH, GLOBAL_BATCH = 16, 4
# Blocks of 4, then of 8, then none: the sequence halves in the middle of the run.
STAGES = [("bdlm", 4), ("bdlm", 4), ("bdlm", 8), ("mdlm", LENGTH), ("mdlm", LENGTH)]
DOCUMENTS = [([7, 5, 4], [False] * 3), ([16], [False]), ([9, 3, 4], [False, False, True]), ([4, 12], [False] * 2)]
NOISE_STD, LEARNING_RATE = 0.1, {"adam": 1e-3, "sgd": 1e-1}
# Of weights, samples and noise. With these no routing decision is near a tie; test_matrix.py asserts it.
SEEDS = {("needed", "sgd"): 6, ("needed", "adam"): 1, ("all", "sgd"): 9, ("all", "adam"): 15}  # by clean tokens

_SHAPE: dict[str, Any] = {"num_layers": 4, "init_std": 0.15, "mask_token_id": MASK_ID}
MODELS = {
    "moe": moe_config(**_SHAPE),
    "dense": dense_config("qwen3", qk_norm=True, **_SHAPE),
    "tied": dense_config("llama", tie_embeddings=True, **_SHAPE),
}
MODELS["moe with all clean tokens"] = MODELS["moe"]  # one length on all ranks, as the all-gather dispatcher needs


@dataclass
class Result:
    """What a rank saw. Differences are against the one-process run and empty in that run itself."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    expert_loads: list[list[list[int]] | None] = field(default_factory=list)  # [steps][MoE layers][experts]
    # of every step, the largest difference relative to the tensor's maximum, by name
    gradient_differences: list[dict[str, float]] = field(default_factory=list)
    # (||dp - dp_ref||^2, ||dp_ref||^2, elements) of this rank's part of the change over all steps, and elements of the
    # whole tensor, by name
    updates: dict[str, tuple[float, float, int, int]] = field(default_factory=dict)
    smallest_margin: float = float("inf")  # between a chosen expert or group and one that was not


def train(
    model: str,
    parallel: ParallelConfig,
    optimizer: str,
    reference: str,
    dtype: str = "float32",
    seed: int | None = None,
) -> Result:
    """Run the steps and compare with, or in one plain process save, the files under ``reference``."""
    from llada_mega.models import build_model
    from llada_mega.training.optimizer import wrap_data_parallel
    from llada_mega.training.step import TrainStep

    clean = "all" if model.endswith("all clean tokens") else "needed"
    seed = SEEDS[clean, optimizer] if seed is None else seed
    groups = initialize(parallel)
    stages = [None] if parallel.vp is None else range(parallel.vp)
    bare = [
        build_model(MODELS[model], parallel=parallel, dtype=getattr(torch, dtype), seed=seed, vp_stage=stage)
        for stage in stages
    ]
    chunks = wrap_data_parallel(bare, parallel)
    step = TrainStep(chunks, _optimizer(optimizer, chunks, parallel, dtype), groups, seed=seed, device=groups.device)
    files = Path(reference)
    is_reference = not files.exists()
    files.mkdir(exist_ok=True)
    result = Result()
    margins = watch_routers(bare) if is_reference else []
    initial = _parameters(bare)
    for index, (layout, block_size) in enumerate(STAGES):

        def accept(measured: Any, index: int = index) -> bool:
            _gather_gradients(chunks)
            gradients = {name: parameter.main_grad for name, parameter in _named(bare)}
            path = files / f"gradients_{index}.safetensors"
            if is_reference:
                save_file({name: gradient.clone() for name, gradient in gradients.items()}, path)
            else:
                result.gradient_differences.append(_differences(bare, gradients, load_file(path)))
            return True

        measured, _ = step(
            [_batch(sample, layout, block_size, seed, clean) for sample in _samples(index, groups)],
            learning_rate=LEARNING_RATE[optimizer],
            embedding_noise_std=NOISE_STD,
            accept=accept,
        )
        result.losses.append(measured.loss)
        result.gradient_norms.append(measured.grad_norm)
        result.expert_loads.append(None if measured.expert_load is None else measured.expert_load.tolist())
    step.gather_parameters()
    change = {name: parameter.float() - initial[name] for name, parameter in _parameters(bare).items()}
    if is_reference:
        save_file(change, files / "change.safetensors")
        result.smallest_margin = min(margins, default=float("inf"))
    else:
        whole = load_file(files / "change.safetensors")
        for name, part, expected in _slices(bare, change, whole):
            squares = [float(difference.square().sum()) for difference in (part - expected, expected)]
            result.updates[name] = (squares[0], squares[1], part.numel(), whole[name].numel())
    return result


def _optimizer(name: str, chunks: list[Any], parallel: ParallelConfig, dtype: str) -> Any:
    """The product's AdamW, or plain SGD, whose update shows an error in a gradient as large as it is."""
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    from llada_mega.training.optimizer import build_optimizer

    if name == "adam":
        return build_optimizer(OptimizerConfig(), chunks, parallel, getattr(torch, dtype))
    config = MegatronOptimizerConfig(optimizer="sgd", lr=1.0, sgd_momentum=0.0, weight_decay=0.0, clip_grad=1.0)
    config.params_dtype, config.bf16 = getattr(torch, dtype), dtype == "bfloat16"
    return get_megatron_optimizer(config, chunks)


def _samples(step: int, groups: ParallelGroups) -> range:
    """This data-parallel rank's samples of the step."""
    share = GLOBAL_BATCH // groups.dp.size()
    first = step * GLOBAL_BATCH + groups.dp.rank() * share
    return range(first, first + share)


def _batch(index: int, layout: str, block_size: int, seed: int, clean_tokens: str) -> Batch:
    """A micro-batch of one sample."""
    lengths, padding = DOCUMENTS[index % len(DOCUMENTS)]
    real = torch.repeat_interleave(~torch.tensor(padding), torch.tensor(lengths))
    generator = torch.Generator().manual_seed(1000 * seed + index)
    tokens = torch.randint(MASK_ID + 1, 150, (LENGTH,), generator=generator)
    return build_batch(
        [Sample(tokens * real, lengths, padding, real, index)],
        layout=layout,
        block_size=block_size,
        objective=DiffusionObjective("elbo", LinearSchedule()),
        schedule=LinearSchedule(),
        seed=seed,
        mask_token_id=MASK_ID,
        pad_token_id=0,
        t_min=0.2,
        t_max=0.9,
        clean_tokens=clean_tokens,
        length_multiple=16,
        row_multiple=8,
    )


# ---- comparing parts of this rank with the whole model ---------------------------------------------------------------


def _named(bare: list[Any]) -> list[tuple[str, Any]]:
    """This rank's parameters under the names of the whole model; a tied table's copy counts where it is computed."""
    from llada_mega.models.naming import global_names

    found = []
    for chunk in bare:
        names = global_names(chunk)
        found += [(names[name], parameter) for name, parameter in chunk.named_parameters()]
    return found


def _parameters(bare: list[Any]) -> dict[str, Tensor]:
    return {name: parameter.detach().float().clone() for name, parameter in _named(bare)}


def _slices(bare: list[Any], parts: dict[str, Tensor], whole: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """(name, this rank's part, the same part of ``whole``)."""
    from llada_mega.models.naming import is_vocabulary, local_slice

    found = []
    for name, part in parts.items():
        expected = whole[name]
        if is_vocabulary(name):  # tables are padded to a multiple of 128 x tp
            expected = expected[: MODELS["moe"].vocab_size]
        found.append((name, part, local_slice(bare[0], name, part, expected)))
    return found


def _differences(bare: list[Any], parts: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((part - expected).abs().max() / whole[name].abs().max().clamp(min=1e-30))
        for name, part, expected in _slices(bare, parts, whole)
    }


def _gather_gradients(chunks: list[Any]) -> None:
    """The distributed optimizer leaves each rank one reduced shard of every bucket: put the whole together."""
    for chunk in chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


# ---- distance to a tie -----------------------------------------------------------------------------------------------


def watch_routers(bare: list[Any]) -> list[float]:
    """Collects, at every forward pass, the smallest margin of a routing decision on a token that is not padding."""
    from llada_mega.models.router import routers

    margins: list[float] = []

    def hook(router: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        with torch.no_grad():
            logits_TE = router.gating(arguments[0]).flatten(0, -2).float()
            padding = keywords.get("padding_mask", arguments[1] if len(arguments) > 1 else None)
            scores_TE = torch.sigmoid(logits_TE) + router.expert_bias
            if padding is not None:
                scores_TE = scores_TE[~padding.flatten()]
            if len(scores_TE):  # a micro-batch without a masked token gives the last layer none
                margins.append(routing_margin(scores_TE, 4, 4, 2))

    for router in routers(bare):
        router.register_forward_hook(hook, with_kwargs=True)
    return margins


def routing_margin(scores_TE: Tensor, top_k: int, num_groups: int, group_top_k: int) -> float:
    """The least by which a score would have to change for another group or expert to be chosen."""
    grouped_TGN = scores_TE.unflatten(1, (num_groups, -1))
    group_TG = grouped_TGN.topk(2, dim=2).values.sum(2)
    ranked_TG = group_TG.sort(1, descending=True)
    group_margin = (ranked_TG.values[:, group_top_k - 1] - ranked_TG.values[:, group_top_k]).min()
    chosen = ranked_TG.indices[:, :group_top_k, None].expand(-1, -1, grouped_TGN.shape[2])
    ranked_TN = grouped_TGN.gather(1, chosen).flatten(1).sort(1, descending=True).values
    expert_margin = (ranked_TN[:, top_k - 1] - ranked_TN[:, top_k]).min()
    return float(torch.minimum(group_margin, expert_margin))
