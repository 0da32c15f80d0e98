"""What ranks do in the tests of the preflight; run by :func:`tests.parallel.harness.run_ranks`."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from launch.preflight import Preflight


def preflight(run_dirs: list[Path], need_bytes: int, minimum: float | None, hosts: list[str]) -> list[str]:
    """The problems that a rank of a job sees whose ranks are on ``hosts``, one each."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": hosts[rank]}
    dist.init_process_group("gloo")
    try:
        return Preflight(run_dirs[rank]).run(need_bytes, minimum)
    finally:
        dist.destroy_process_group()


def one_stays_away(run_dir: Path) -> str:
    """What a rank hears of a peer that does not come."""
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"n{os.environ['RANK']}"}
    dist.init_process_group("gloo")
    check = Preflight(run_dir, timeout=timedelta(seconds=1))
    if check.rank == 1:
        time.sleep(3)
        return ""
    try:
        check.pass_together("a test")
    except RuntimeError as error:
        return str(error)
    return "passed"
