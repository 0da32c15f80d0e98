"""Process groups of one process and of eight, their names and sizes, and the refusal of layouts that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.parallel import current_groups, destroy, ensure_single_process, initialize
from tests.parallel.harness import run_ranks

pytestmark = pytest.mark.latest


@pytest.fixture(autouse=True)
def no_groups() -> Iterator[None]:
    destroy()
    yield
    destroy()


def test_one_process_needs_no_launcher_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    groups = ensure_single_process()
    assert (groups.rank, groups.world_size) == (0, 1)
    assert groups.tp.size() == groups.pp.size() == groups.dp.size() == groups.ep.size() == 1
    assert groups.is_first_stage
    assert groups.is_last_stage
    assert ensure_single_process() is groups
    assert current_groups() is groups


def test_destroy_and_start_again() -> None:
    first = ensure_single_process()
    destroy()
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match="not initialised"):
        current_groups()
    assert ensure_single_process() is not first


def test_destroy_leaves_a_world_of_someone_else_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ensure_single_process()
        destroy()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def gloo_threads() -> int:
    """Threads of gloo in this process; 0 where there is no /proc."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    return names.count("gloo_tcp_loop")


@pytest.mark.skipif(torch.cuda.is_available(), reason="groups on NCCL stay as Megatron makes them")
def test_groups_of_one_rank_are_one_and_have_few_threads() -> None:
    before = gloo_threads()  # of what other tests have left
    groups = ensure_single_process()
    first = groups.tp
    assert all(group is first for group in (groups.pp, groups.cp, groups.ep, groups.dp_cp, groups.expt_dp))
    assert gloo_threads() <= before + 4
    destroy()
    again = ensure_single_process()  # the old world's group would hang here
    dist.all_reduce(torch.ones(1), group=again.tp)
    assert again.tp is not first


def test_groups_are_made_once() -> None:
    initialize(ParallelConfig())
    with pytest.raises(ConfigError, match=r"call llada_mega\.parallel\.destroy"):
        initialize(ParallelConfig())


def test_initialize_refuses_a_layout_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="parallel.tp=2 x pp=2 x cp=1 = 4 does not divide the 1 processes"):
        initialize(ParallelConfig(tp=2, pp=2))
    with pytest.raises(ConfigError, match=r"parallel\.etp=1 x ep=4 x pp=1 = 4 does not divide the 1 processes"):
        initialize(ParallelConfig(ep=4))
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals without CUDA")
def test_initialize_refuses_a_backend_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.backend=nccl needs a CUDA device; set parallel\.backend=auto"):
        initialize(ParallelConfig(backend="nccl"))
    assert not dist.is_initialized()


def places(parallel: ParallelConfig) -> dict[str, Any]:
    """What one rank knows of its place: its name and the ranks of its groups."""
    groups = initialize(parallel)
    names = ("dp", "pp", "cp", "tp", "ep", "dp_cp", "tp_dp_cp", "expt_tp", "expt_dp", "mp")
    members = {name: dist.get_process_group_ranks(getattr(groups, name)) for name in names}
    named = str(groups)
    destroy()
    return {"name": named, "members": members, "world_left": dist.is_initialized()}


def test_dense_groups_are_laid_out_tensor_fastest_and_pipeline_slowest() -> None:
    ranks = run_ranks(places, 8, parallel=ParallelConfig(tp=2, cp=2, pp=2, sp=True))
    assert [rank["name"] for rank in ranks[:6]] == [
        "rank 0 (dp 0, pp 0, cp 0, tp 0, ep 0)",
        "rank 1 (dp 0, pp 0, cp 0, tp 1, ep 0)",
        "rank 2 (dp 0, pp 0, cp 1, tp 0, ep 0)",
        "rank 3 (dp 0, pp 0, cp 1, tp 1, ep 0)",
        "rank 4 (dp 0, pp 1, cp 0, tp 0, ep 0)",
        "rank 5 (dp 0, pp 1, cp 0, tp 1, ep 0)",
    ]
    assert ranks[5]["members"] == {
        "dp": [5],
        "pp": [1, 5],
        "cp": [5, 7],
        "tp": [4, 5],
        "ep": [5],
        "dp_cp": [5, 7],
        "tp_dp_cp": [4, 5, 6, 7],
        "expt_tp": [5],
        "expt_dp": [4, 5, 6, 7],
        "mp": [0, 1, 4, 5],
    }
    assert not any(rank["world_left"] for rank in ranks)


def test_expert_groups_share_ranks_with_data_context_and_tensor_parallelism() -> None:
    ranks = run_ranks(places, 8, parallel=ParallelConfig(tp=2, cp=2, ep=2, etp=2, dispatcher="allgather", sp=True))
    assert ranks[5]["name"] == "rank 5 (dp 1, pp 0, cp 0, tp 1, ep 0)"
    members = ranks[5]["members"]
    assert (members["expt_tp"], members["ep"], members["expt_dp"]) == ([4, 5], [5, 7], [1, 5])
    assert (members["tp"], members["cp"], members["dp"]) == ([4, 5], [5, 7], [1, 5])
