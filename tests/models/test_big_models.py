"""The published models under the layouts of their experiments: every rank's part, built on the meta device.

Nothing is allocated and no other rank exists: a fake process group plays the whole world. What a stage has to hold is
worked out here from the shape of the model; ``make te-check`` compares these layers with TransformerEngine's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from llada_mega.config.compose import compose
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.models import build_model
from llada_mega.models.naming import global_names, is_vocabulary, split_dimension, tensor_parallel_group
from llada_mega.parallel import destroy, initialize
from tests.parallel.harness import run_ranks
from tests.te import fake_cuda

# experiment: (GPUs, ranks of a pipeline stage that hold one copy of every weight, parameters)
PUBLISHED = {"cpt_16b": (64, 8, 16_255_638_528), "cpt_100b": (256, 8, 102_889_697_280)}
Part = tuple[str, int]  # name in the whole model, and which shard of it


@dataclass(frozen=True)
class Rank:
    """What one rank holds: parameters with their padding, and the elements of every part without it."""

    number: int
    stage: int
    expert_rank: int
    parameters: int
    parts: dict[Part, int]


class _OnMeta(TorchFunctionMode):
    """Tensors for which a module names a device come to the meta device too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if "device" in kwargs else kwargs))


def build_ranks(model: ModelConfig, parallel: ParallelConfig, gpus: int, numbers: list[int]) -> list[Rank]:
    """Be each of ``numbers`` in turn; in a process of the harness, whose process groups are nobody else's."""
    return [_build(model, parallel, gpus, number) for number in numbers]


def _build(model: ModelConfig, parallel: ParallelConfig, gpus: int, number: int) -> Rank:
    stages = range(parallel.vp) if parallel.vp else [None]
    with fake_cuda.world(number, gpus):
        groups = initialize(parallel)
        with torch.device("meta"), _OnMeta():
            chunks = [
                build_model(model, parallel=parallel, dtype=torch.bfloat16, seed=None, vp_stage=stage)
                for stage in stages
            ]
        parts: dict[Part, int] = {}
        for chunk in chunks:
            names = global_names(chunk)
            for local, parameter in chunk.named_parameters():
                assert parameter.is_meta, local
                name, rows = names[local], len(parameter)
                shard = 0 if split_dimension(name) is None else tensor_parallel_group(chunk, name).rank()
                real = min(rows, max(0, model.vocab_size - shard * rows)) if is_vocabulary(name) else rows
                assert (name, shard) not in parts
                parts[name, shard] = parameter.numel() // rows * real
        held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        built = Rank(number, groups.pp.rank(), groups.ep.rank(), held, parts)
        destroy()
    return built


def layers_of_stage(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[int]:
    """Chunks of equal size go round the stages in circles."""
    in_chunk = model.num_layers // (parallel.pp * (parallel.vp or 1))
    return [layer for layer in range(model.num_layers) if layer // in_chunk % parallel.pp == stage]


def parameters_of_rank(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Closed form of an untied Ling model with normalised queries and keys; all ranks of a stage hold as many."""
    hidden, moe = model.hidden_size, model.moe
    query, key_value = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    table = -(-model.vocab_size // (128 * parallel.tp)) * 128 * hidden
    total = table * (stage == 0) + (table + hidden) * (stage == parallel.pp - 1)  # the final norm goes with the output
    for layer in layers_of_stage(model, parallel, stage):
        total += hidden * (query + 2 * key_value) // parallel.tp + query * hidden // parallel.tp
        total += 2 * hidden + 2 * model.head_dim  # norms, on every rank
        if layer < moe.first_dense_layers:
            total += 3 * hidden * model.ffn_hidden_size // parallel.tp
        else:
            total += 3 * hidden * moe.shared_expert_ffn_hidden_size // parallel.tp
            total += moe.num_experts // parallel.ep * 3 * hidden * moe.expert_ffn_hidden_size // parallel.etp
            total += moe.num_experts * hidden  # the router, on every rank
    return total


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_every_stage_holds_its_part_of_the_model(experiment: str) -> None:
    gpus, shards, total = PUBLISHED[experiment]
    config = compose(Config, [f"experiment={experiment}", "model.implementation=local"])
    validate(config, world_size=gpus)
    model, parallel = config.model, config.parallel
    stage_size = gpus // parallel.pp
    # One copy of every weight, and the last rank of every stage, which is the last data-parallel one.
    numbers = [stage * stage_size + place for stage in range(parallel.pp) for place in (*range(shards), stage_size - 1)]
    (ranks,) = run_ranks(build_ranks, 1, model=model, parallel=parallel, gpus=gpus, numbers=numbers)
    assert [(rank.number, rank.stage) for rank in ranks] == [(number, number // stage_size) for number in numbers]

    whole: dict[Part, int] = {}
    for rank in ranks:
        assert rank.parameters == parameters_of_rank(model, parallel, rank.stage), f"rank {rank.number}"
        assert numbers_in(rank, r"decoder\.layers\.(\d+)\.") == layers_of_stage(model, parallel, rank.stage)
        experts = model.moe.num_experts // parallel.ep
        assert numbers_in(rank, r"\.local_experts\.(\d+)\.") == [
            *range(experts * rank.expert_rank, experts * (rank.expert_rank + 1))
        ]
        tables = {name for name, _ in rank.parts if is_vocabulary(name)}
        assert ("embedding.word_embeddings.weight" in tables) == (rank.stage == 0)
        assert ("output_layer.weight" in tables) == (rank.stage == parallel.pp - 1)
        assert all(whole.setdefault(part, size) == size for part, size in rank.parts.items())
    assert sum(whole.values()) == total


def numbers_in(rank: Rank, pattern: str) -> list[int]:
    """The numbers that ``pattern`` finds in the names of what the rank holds."""
    return sorted({int(match[1]) for name, _ in rank.parts if (match := re.search(pattern, name))})
