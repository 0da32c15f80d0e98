"""Where the host waits for a GPU in a training step: nowhere but in the places listed here.

The steps run on the meta device in a process of their own (:mod:`tests.models.meta_gpu`), as on a GPU without
TransformerEngine, whose modules could not run there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.models.meta_gpu_cases import CASES, LAYER_PASSES, MICRO_BATCHES, Case

pytestmark = pytest.mark.latest

SCHEDULES = "megatron/core/pipeline_parallel/schedules.py"
# What a step may wait for, why, and how often.
ONCE_A_STEP = {
    # Clipping, the check for a step that is not finite and the metrics need it on the host.
    "item at megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32",
    # All metrics in one vector: callbacks decide by them whether the optimizer may run.
    "copy from the device at llada_mega/training/step.py:_measure",
}
SOME_VERSIONS = {
    # Megatron-Core 0.16 asks whether there are any tokens before it divides by their number.
    "item at megatron/core/distributed/finalize_model_grads.py:finalize_model_grads": 1,
    # Megatron-Core 0.19 sets the scale of an auxiliary loss, which we do not have, once a micro-batch.
    f"copy of numbers to the device at {SCHEDULES}:_normalize_loss_scale": MICRO_BATCHES,
}
# Megatron-Core's all-to-all needs on the host how many tokens go to which rank and expert: five vectors, one wait.
ALL_TO_ALL = {"copy from the device at megatron/core/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu": 5}
# Without TransformerEngine's kernel the routes are found by selecting, in 0.16 for tokens and shares.
UNFUSED_PERMUTATION = "masked_select at megatron/core/transformer/moe/moe_utils.py:permute"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.models.meta_gpu"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout[ran.stdout.index("{") :])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.only_build])
def test_a_step_waits_only_where_it_must(found: dict[str, Any], name: str) -> None:
    waits = dict(found["steps"][name]["waits"])
    case: Case = CASES[name]
    optimizers = 1 if case.world_size == 1 or case.model == "dense" else 2  # of dense and of expert parameters
    for wait in ONCE_A_STEP:
        assert waits.pop(wait) == (optimizers if "get_grad_norm" in wait else 1), wait
    for wait, times in SOME_VERSIONS.items():
        assert waits.pop(wait, times) == times, wait
    if case.parallel.ep > 1:
        for wait, times in ALL_TO_ALL.items():
            assert waits.pop(wait) == times * LAYER_PASSES, wait
        assert waits.pop(UNFUSED_PERMUTATION, 0) in (0, LAYER_PASSES, 2 * LAYER_PASSES)
    assert not waits, f"the host waits for the device: {waits}"


def test_experts_and_dispatchers(found: dict[str, Any]) -> None:
    classes = {name: set(step["classes"]) for name, step in found["steps"].items()}
    assert all("GroupedExperts" in mine for name, mine in classes.items() if CASES[name].model == "moe")
    assert "DeviceDispatcher" in classes["moe"]
    assert "MoEAlltoAllTokenDispatcher" in classes["moe, ep2"]
    assert {"MoEFlexTokenDispatcher", "_DeepepManager"} <= classes["moe, ep2, deepep"]
    assert {"MoEFlexTokenDispatcher", "_HybridEPManager"} <= classes["moe, ep2, hybridep"]


def test_waits_are_seen(found: dict[str, Any]) -> None:
    """Of every kind, and nothing where there is none."""
    assert found["probes"] == {
        "item": ["item"],
        "float": ["item"],
        "branch": ["item"],
        "tolist": ["copy from the device"],
        "cpu": ["copy from the device"],
        "to the device": ["copy to the device"],
        "numbers": ["copy of numbers to the device"],
        "copy": ["copy"],
        "nonzero": ["nonzero"],
        "boolean index": ["boolean index"],
        "masked_select": ["masked_select"],
        "unique": ["unique"],
        "repeats": ["repeat_interleave"],
        "equal": ["equal"],
        "nothing": [],
        "asynchronous": [],
    }
