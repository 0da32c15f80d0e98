"""The harness reports what ranks return, raise, and die or hang of."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.parallel.harness import RankError, run_ranks

pytestmark = pytest.mark.latest


def rank_and_sum(number: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    from llada_mega.config.run import ParallelConfig
    from llada_mega.parallel import initialize

    groups = initialize(ParallelConfig())
    total = torch.tensor([number * (groups.rank + 1)])
    dist.all_reduce(total)
    return groups.rank, int(total)


def raise_on_one_rank_while_others_wait() -> None:
    import torch.distributed as dist

    from llada_mega.config.run import ParallelConfig
    from llada_mega.parallel import initialize

    groups = initialize(ParallelConfig())
    if groups.rank == 1:
        time.sleep(0.3)
        raise ValueError("rank one is ill")
    dist.barrier()


def die_on_one_rank() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def hang() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def test_every_rank_returns_its_result() -> None:
    for world_size in (1, 3):
        expected = 5 * sum(range(1, world_size + 1))
        assert run_ranks(rank_and_sum, world_size, number=5) == [(rank, expected) for rank in range(world_size)]


def test_the_first_error_ends_the_job_and_the_next_job_runs() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)^rank 1: Traceback.*ValueError: rank one is ill"):
        run_ranks(raise_on_one_rank_while_others_wait, 2)
    assert run_ranks(f"{__name__}:rank_and_sum", 2, number=1)[0] == (0, 3)
    assert time.monotonic() - start < 60


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 died: signal SIGSEGV"):
        run_ranks(die_on_one_rank, 2)


def test_a_rank_that_hangs_shows_where() -> None:
    with pytest.raises(RankError, match=r"(?s)^rank 1: not done after 1 s.*in hang"):
        run_ranks(hang, 2, timeout=1)


def test_a_function_that_does_not_exist_is_reported() -> None:
    with pytest.raises(RankError, match="AttributeError"):
        run_ranks("tests.parallel.test_harness:nothing", 1)
