"""Memory of a plan against what real steps hold: every storage tracked, every component named."""

from __future__ import annotations

import gc

import pytest
import torch

from bench.live_memory import BACKWARD, OUTSIDE, LiveMemory
from bench.memory import MOE, RUNS, measure, run_of
from llada_mega.planning.schedule import State, states
from tests.parallel.harness import run_ranks

NAMED = 0.02  # share of the peak above which a component has to be in the plan
OFF = 0.10  # of the peak; a component may be off by half of it
QUICK = tuple(name for name in RUNS if name not in ("SmolLM2-135M", "experts, vocabulary of 49153"))
LAYOUTS = {
    "distributed optimizer": (2, "parallel.distributed_optimizer=true", "trainer.dtype=bfloat16"),
    "tensor": (2, "parallel.tp=2", "parallel.sp=true"),
    "context": (2, "parallel.cp=2"),
    "experts": (2, "parallel.ep=2"),
    "experts, distributed optimizer": (
        2,
        "parallel.ep=2",
        "parallel.distributed_optimizer=true",
        "trainer.dtype=bfloat16",
    ),
    "experts by all-gather": (2, "parallel.ep=2", "parallel.dispatcher=allgather", "data.clean_tokens=all"),
    "expert tensors": (2, "parallel.tp=2", "parallel.sp=true", "parallel.etp=2", "parallel.dispatcher=allgather"),
    "expert tensors, other samples": (
        2,
        "parallel.etp=2",
        "parallel.dispatcher=allgather",
        "data.clean_tokens=all",
    ),
    "pipeline": (2, "parallel.pp=2"),
    "interleaved pipeline": (2, "parallel.pp=2", "parallel.vp=2"),
}


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(run, marks=pytest.mark.full) for run in RUNS if run not in QUICK)]
)
def test_the_plan_is_what_a_step_holds(name: str) -> None:
    found = measure(RUNS[name])
    peak = sum(found.measured.values())
    assert abs(found.ratio - 1) < OFF
    assert {part for part, size in found.measured.items() if size > NAMED * peak} <= set(found.planned)
    part, off = found.worst()
    assert abs(off) < OFF / 2, f"{part} is off by {off:.1%} of the peak"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_of_a_rank_is_what_it_holds(name: str) -> None:
    nproc, *layout = LAYOUTS[name]
    overrides = run_of(512, 1, 32, *MOE, "trainer.global_batch_size=4", *layout)
    for rank, found in enumerate(run_ranks(measure, nproc, overrides=overrides)):
        assert abs(found.ratio - 1) < OFF, f"rank {rank}: {found}"


def test_the_tracker_counts_storages_once_and_until_they_die() -> None:
    linear = torch.nn.Linear(256, 256, bias=False)
    x = torch.ones(64, 256)
    tracker = LiveMemory({linear: "layer"})
    tracker.hold("weights", [linear.weight, linear.weight.detach()])
    with tracker:
        y = linear(x)  # 64 KiB, and views of it cost nothing
        z = y.view(-1)[1:]
        assert tracker.at_peak == {"weights": 2**18, "layer": 2**16}
        del y, z
        twice = [linear(x) for _ in range(2)]
        del twice
        gc.collect()
        four = x.repeat(4, 1)
    assert tracker.at_peak == {"weights": 2**18, OUTSIDE: 2**18}
    assert tracker.peak == 2**19 and four.shape == (256, 256)


def test_the_backward_pass_is_told_apart() -> None:
    x = torch.ones(256, requires_grad=True)
    with (tracker := LiveMemory({})):
        (x * 2).sum().backward()
    assert set(tracker.at_peak) == {BACKWARD, OUTSIDE}


def test_a_pipeline_holds_one_pass_for_every_stage_behind() -> None:
    for stage in range(4):
        assert max(state.held[0] for state in states(4, 1, stage, 64)) == 4 - stage
    assert states(4, 1, 0, 2) == (State((2,), 0),)  # no more than there are


def test_an_interleaved_pipeline_goes_on_with_the_first_chunk() -> None:
    # Rank 0 of 2 stages with 2 chunks: forward 0 0 1 1 | 0, backward 1, forward 0, backward 1, ...
    assert {State((3, 2), 1), State((4, 1), 1)} <= set(states(2, 2, 0, 8))
    for state in states(4, 2, 1, 64):
        assert sum(state.held) <= 2 * 2 + 4 + 1
