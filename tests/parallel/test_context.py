"""Context parallelism gives the numbers of one process: loss, every gradient, expert loads."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from llada_kernels import IntervalMask
from llada_kernels.exchange import KeyExchange
from llada_kernels.partition import RowPartition

from tests.parallel import context_worker
from tests.parallel.harness import run_ranks

pytestmark = pytest.mark.latest

DIVIDED = {"layout": "bdlm", "block_size": 4, "alignment": 8}  # no block is cut: only clean keys cross
CUT = {"layout": "bdlm", "block_size": 20, "alignment": 1}
MDLM = {"layout": "mdlm", "block_size": 512, "alignment": 8}
AR = {"layout": "ar", "block_size": 1, "alignment": 8}
ATTENTION_AGAIN = {"recompute": "selective", "recompute_modules": ["core_attn"]}

# name: model, data, layout, processes, whose keys cross in its micro-batches
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, str]] = {
    "dense-divided-cp2": ("dense", DIVIDED, {"cp": 2}, 2, "clean"),
    "dense-divided-cp4-selective": ("dense", DIVIDED, {"cp": 4, **ATTENTION_AGAIN}, 4, "clean"),
    "dense-cut-cp4": ("dense", CUT, {"cp": 4}, 4, "all"),
    "dense-mdlm-cp2": ("dense", MDLM, {"cp": 2}, 2, "all"),
    "dense-ar-cp4": ("dense", AR, {"cp": 4}, 4, "all"),
    "dense-divided-cp2-tp2": ("dense", DIVIDED, {"cp": 2, "tp": 2}, 4, "clean"),
    "moe-divided-cp2": ("moe", DIVIDED, {"cp": 2}, 2, "clean"),
    "moe-ar-cp2": ("moe", AR, {"cp": 2}, 2, "all"),
    "moe-mdlm-cp4-ep2": ("moe", MDLM, {"cp": 4, "ep": 2}, 4, "all"),
    "moe-cut-cp2-ep2-allgather": ("moe", CUT, {"cp": 2, "ep": 2, "dispatcher": "allgather"}, 2, "all"),
    "moe-divided-cp2-tp2": ("moe", DIVIDED, {"cp": 2, "tp": 2, "sp": True}, 4, "clean"),
    "moe-divided-cp2-pp2-full": ("moe", DIVIDED, {"cp": 2, "pp": 2, "recompute": "full"}, 4, "clean"),
}


@cache
def single(model: str, data: tuple[tuple[str, Any], ...], dtype: torch.dtype) -> dict[str, Any]:
    """The same on one process."""
    return run_ranks(context_worker.compute, 1, model_name=model, parallel={}, data=dict(data), dtype=dtype)[0]


def results(name: str, dtype: torch.dtype) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    model, data, parallel, world_size, _ = CASES[name]
    # tokens enough for a whole tile of noisy and of clean rows on each rank
    data = {**data, "length": 128 * parallel["cp"], "multiple": 16 * parallel["cp"]}
    one = single(model, tuple(data.items()), dtype)
    shared = {"model_name": model, "parallel": parallel, "data": data, "dtype": dtype, "expected": one["gradients"]}
    return one, run_ranks(context_worker.compute, world_size, **shared)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_context_parallelism_gives_the_numbers_of_one_process(name: str) -> None:
    one, ranks = results(name, torch.float64)
    assert one["rows"] > 0
    for result in ranks:
        assert result["halves"] == set(CASES[name][4].split())
        assert result["rows"] == one["rows"]
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-12)
        assert result["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-6)  # Megatron adds it up in fp32
        assert max(result["differences"].values()) <= 1e-10, result["differences"]
        if "pp" not in CASES[name][2]:  # a pipeline stage knows the loads of its own layers only
            assert result["loads"] == one["loads"]
    assert set().union(*(result["differences"] for result in ranks)) == set(one["gradients"])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "loss", "gradient"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 5e-2)])
def test_narrow_types(dtype: torch.dtype, loss: float, gradient: float) -> None:
    one, ranks = results("dense-divided-cp2", dtype)
    for result in ranks:
        assert result["loss"] == pytest.approx(one["loss"], rel=loss)
        assert result["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=gradient)
        assert max(result["differences"].values()) <= gradient, result["differences"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_keys_and_gradients_against_indexing(dtype: torch.dtype) -> None:
    """Forward is indexing by position; backward sums, over the ranks that have a key, what attention gave there."""
    mask = IntervalMask.block_diffusion([60, 68, 128], 4)
    partition = RowPartition.balanced(mask, 2, 256)
    exchange = KeyExchange.exact(mask, partition)
    assert exchange.halves == "clean"
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(rows, 1, 2, 3, generator=generator).to(dtype)

    sequence = {"key": draw(512), "value": draw(512)}
    positions = [exchange.keys(rank) for rank in range(2)]
    parts: dict[str, Any] = {name: [partition.shard(x, rank) for rank in range(2)] for name, x in sequence.items()}
    parts |= {f"{name}_grad": [draw(len(p)) for p in positions] for name in sequence}
    parts |= {"num_sent": exchange.num_sent, "places": [exchange.of_rank(rank).places_K for rank in range(2)]}
    for rank, result in enumerate(run_ranks(context_worker.gather_on, 2, parts=parts)):
        for name, x in sequence.items():
            assert torch.equal(result[name], x[positions[rank]])
            total = torch.zeros(x.shape)
            for gradient, where in zip(parts[f"{name}_grad"], positions, strict=True):
                total.index_add_(0, where, gradient.float())
            assert torch.equal(result[f"{name}_grad"], partition.shard(total, rank).to(dtype))
