"""The same training steps under tensor, sequence, pipeline, expert and data parallelism, on gloo."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from llada_mega.config.run import ParallelConfig
from tests.parallel.harness import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.latest]

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dense": ("dense", 1, {}),
    "dense-dp2": ("dense", 2, {}),
    "dense-dp2-distributed-optimizer": ("dense", 2, {"distributed_optimizer": True}),
    "dense-tp2": ("dense", 2, {"tp": 2}),
    "dense-tp2-sp": ("dense", 2, {"tp": 2, "sp": True}),
    "dense-pp2-vp2": ("dense", 2, {"pp": 2, "vp": 2}),
    "tied": ("tied", 1, {}),
    "tied-pp2": ("tied", 2, {"pp": 2}),
    "tied-tp2-recompute": ("tied", 2, {"tp": 2, "recompute": "full"}),
    "moe": ("moe", 1, {}),
    "moe-ep2": ("moe", 2, {"ep": 2}),
    "moe-ep2-allgather": ("moe", 2, {"ep": 2, "dispatcher": "allgather"}),
    "moe-tp2-sp-ep2": ("moe", 2, {"tp": 2, "sp": True, "ep": 2}),
    "moe-pp2": ("moe", 2, {"pp": 2, "recompute": "full"}),
}


@functools.cache
def trained(name: str) -> dict[str, Any]:
    """What rank 0 says of one layout."""
    model, world_size, parallel = CASES[name]
    work = "tests.parallel.layout_worker:train"
    return run_ranks(work, world_size, model_name=model, parallel=ParallelConfig(**parallel))[0]


@pytest.mark.parametrize("name", [name for name in CASES if "-" in name])
def test_layout_gives_the_numbers_of_one_process(name: str) -> None:
    result, single = trained(name), trained(CASES[name][0])
    assert result["losses"] == pytest.approx(single["losses"], rel=2e-5)
    assert result["gradient_norms"] == pytest.approx(single["gradient_norms"], rel=2e-4)
    if "pp" not in CASES[name][2]:  # a pipeline stage knows the loads of its own layers only
        assert result["loads"] == single["loads"]
