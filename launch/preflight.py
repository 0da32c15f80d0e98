"""Before the long part: do all nodes work, and work together? Runs under torchrun on every rank of the job.

Checks of each rank: its GPU computes and has its memory free, the run directory can be written and is the same on all
nodes, the disk has room, clocks agree. Then all-reduces inside every node, between neighbouring nodes, and over all.
What fails is listed by node; the exit status is 1 then. Works with NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.checks import Bandwidth, Report, find_problems, table

TIMEOUT = timedelta(minutes=3)  # for one check; the first collective of a group connects all its ranks
_GPU_BYTES, _CPU_BYTES, _REPEATS = 2**28, 2**22, 5


class Preflight:
    """One rank of it.

    Args:
        run_dir: where the run will write.
        timeout: for what all ranks have to pass together.
    """

    def __init__(self, run_dir: Path, timeout: timedelta = TIMEOUT) -> None:
        self.run_dir, self.timeout = run_dir, timeout
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        self.hosts: list[str] = self.gather(os.environ.get("SLURMD_NODENAME") or socket.gethostname())

    def run(self, need_bytes: int, minimum: float | None) -> list[str]:
        """All checks; problems, by node. Rank 0 prints what was found."""
        reports = self.gather(self.local_report())
        problems, bandwidths = find_problems(reports, need_bytes=need_bytes), []
        if not problems:  # with a broken GPU the rest would hang
            bandwidths = self.bandwidths()
            problems = find_problems(reports, need_bytes=need_bytes, bandwidths=bandwidths, minimum=minimum)
        if self.rank == 0:
            lines = ["preflight:", *table(reports, bandwidths), *(f"  UNFIT {problem}" for problem in problems)]
            print("\n".join(lines), flush=True)
        return problems

    def local_report(self) -> Report:
        """What this rank finds by itself. A collective: clocks are read at the same moment."""
        report = Report(host=self.hosts[self.rank], rank=self.rank)
        try:
            if self.device.type == "cuda":
                report.device = torch.cuda.get_device_name(self.device)
                free, total = torch.cuda.mem_get_info(self.device)
                report.free_memory = free / total
                _compute(self.device)
            report.free_bytes = shutil.disk_usage(self.run_dir).free
        except (RuntimeError, OSError) as error:
            report.problem = str(error).splitlines()[0]
        report.problem = self._same_directory() or report.problem
        self.pass_together("local checks")
        report.clock = time.time()
        return report

    def _same_directory(self) -> str:
        """The first rank leaves a file, every rank must see it and be able to write beside it."""
        mark, problem = self.run_dir / ".preflight", ""
        token = self.gather(os.urandom(8).hex())[0]
        try:
            if self.rank == 0:
                mark.write_text(token)
            self.pass_together("writing to the run directory")
            if not mark.exists() or mark.read_text() != token:
                problem = f"{self.run_dir.absolute()} is not the directory that rank 0 sees; put it on a shared disk"
            own = self.run_dir / f".preflight_{self.rank}"
            own.write_bytes(b"\0" * 2**20)
            own.unlink()
        except OSError as error:
            problem = f"{self.run_dir}: {error.strerror or error}"
        self.pass_together("reading the run directory")
        if self.rank == 0:
            mark.unlink(missing_ok=True)
        return problem

    def bandwidths(self) -> list[Bandwidth]:
        """All-reduces inside each node, between neighbours in two pairings, and over all; known to every rank."""
        measured: dict[tuple[str, ...], float] = {}
        for what, groups in all_reduce_rounds(self.world_size // self.local_size, self.local_size):
            mine = next((ranks for ranks in groups if self.rank in ranks), None)
            rate = self._all_reduce(mine) if mine else None
            self.pass_together(f"all-reduce {what}")
            rates = self.gather(rate)
            for ranks in groups:
                hosts = tuple(dict.fromkeys(self.hosts[rank] for rank in ranks))
                measured[hosts] = min(rates[rank] for rank in ranks)
        return [Bandwidth(hosts, rate) for hosts, rate in measured.items()]

    def _all_reduce(self, ranks: Sequence[int]) -> float:
        """GB/s that each of ``ranks`` sends in an all-reduce done by a ring, as this one saw it."""
        group = dist.new_group(list(ranks), timeout=self.timeout, use_local_synchronization=True)
        size = _GPU_BYTES if self.device.type == "cuda" else _CPU_BYTES
        tensor = torch.ones(size // 4, device=self.device)
        dist.all_reduce(tensor, group=group)  # connects
        _synchronize(self.device)
        start = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(tensor, group=group)
        _synchronize(self.device)
        seconds = (time.perf_counter() - start) / _REPEATS
        dist.destroy_process_group(group)
        return 2 * (len(ranks) - 1) / len(ranks) * size / seconds / 1e9

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def pass_together(self, what: str) -> None:
        """Wait for all ranks. Raises RuntimeError naming the nodes of those that do not come (on rank 0)."""
        try:
            dist.monitored_barrier(self.control, timeout=self.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            listed = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            if listed is None or self.rank:
                raise
            missing = [int(rank) for rank in re.findall(r"\d+", listed[1])]
            where = ", ".join(f"{self.hosts[rank]} (rank {rank})" for rank in missing)
            raise RuntimeError(f"{what}: no sign for {self.timeout.total_seconds():.0f} s from {where}") from error


def all_reduce_rounds(nodes: int, local_size: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Names of rounds and the groups of ranks that reduce at the same time in each.

    Nodes form a ring and are paired with both neighbours, in different rounds, so that a slow node is told from them.
    """
    of_node = [list(range(node * local_size, (node + 1) * local_size)) for node in range(nodes)]
    if local_size > 1:
        yield "inside nodes", of_node
    edges = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else nodes - 1)]
    closing = [edges.pop()] if nodes > 2 and nodes % 2 else []  # meets both kinds of the others
    for pairs in (edges[0::2], edges[1::2], closing):
        if pairs:
            yield "between neighbours", [of_node[first] + of_node[second] for first, second in pairs]
    if nodes > 2:
        yield "over all nodes", [list(range(nodes * local_size))]


def _compute(device: torch.device) -> None:
    """A matrix product with a known result. Raises RuntimeError."""
    ones = torch.ones(2048, 2048, device=device, dtype=torch.bfloat16)
    if not torch.equal(ones @ ones, torch.full_like(ones, 2048)):
        raise RuntimeError(f"{torch.cuda.get_device_name(device)} computes wrong products")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """0 when nothing is wrong."""
    parser = argparse.ArgumentParser(description="Checks the nodes of a run; started by launch/torchrun.sh.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--need-bytes", type=int, required=True, help="free space that the run directory must have")
    options = parser.parse_args()
    minimum = os.environ.get("PREFLIGHT_MIN_GBPS")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        problems = Preflight(options.run_dir).run(options.need_bytes, float(minimum) if minimum else None)
    except RuntimeError as error:
        print(f"preflight: UNFIT {error}", flush=True)
        return 1
    finally:
        dist.destroy_process_group()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
