"""Process groups of a single process, and the refusal of layouts that cannot be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.parallel import check_sizes, current_groups, destroy, ensure_single_process, initialize

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


def test_groups_are_made_once() -> None:
    initialize(ParallelConfig())
    with pytest.raises(ConfigError, match=r"call llada_mega\.parallel\.destroy"):
        initialize(ParallelConfig())


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ({"tp": 3}, 8, r"parallel\.tp=3 .* = 3 does not divide the number of processes 8; start a multiple of 3"),
        ({"tp": 2, "pp": 2}, 1, "= 4 does not divide the number of processes 1; start a multiple of 4 processes"),
        ({"ep": 4}, 2, r"parallel\.ep=4 .* = 4 does not divide the number of processes 2; lower parallel\.ep"),
        ({"cp": 2}, 2, r"parallel\.cp=2: context parallelism is not supported yet; use parallel\.cp=1"),
        ({"vp": 2}, 1, r"parallel\.vp=2 needs parallel\.pp > 1; leave parallel\.vp null"),
        ({"sp": True}, 1, r"parallel\.sp=true needs parallel\.tp > 1; set parallel\.sp=false"),
        ({"tp": 0}, 1, r"parallel\.tp=0 must be at least 1"),
    ],
)
def test_impossible_layouts_say_how_to_mend_them(sizes: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(ParallelConfig(**sizes), world_size)  # type: ignore[arg-type]


def test_possible_layouts_pass() -> None:
    check_sizes(ParallelConfig(tp=2, pp=2, ep=4, sp=True), 16)
