"""What the preflight has found, and what of it is wrong. No processes, no torch: the judgement can be tested."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_CLOCK_SECONDS = 2.0  # a barrier's length is far below it; logs of several nodes are merged by time
MIN_FREE_MEMORY = 0.9  # of a GPU, before anything runs on it
SLOW = 0.5  # of the median of its kind
_MIN_SAMPLES = 3  # below that there is no median to be slower than


@dataclass
class Report:
    """One rank's view of its machine.

    Attributes:
        host: name of its node.
        device: name of its GPU, or "cpu".
        free_memory: share of the GPU's memory that is free; 1 on CPUs.
        problem: what failed, or "".
        free_bytes: on the file system of the run directory.
        clock: seconds since the epoch, all ranks at the same moment.
    """

    host: str
    rank: int
    device: str = "cpu"
    free_memory: float = 1.0
    problem: str = ""
    free_bytes: int = 0
    clock: float = 0.0


@dataclass(frozen=True)
class Bandwidth:
    """An all-reduce over all ranks of ``hosts``: bytes that each rank sends, in GB/s, for the slowest of them."""

    hosts: tuple[str, ...]
    gbps: float

    @property
    def kind(self) -> str:
        return {1: "inside a node", 2: "between two nodes"}.get(len(self.hosts), "over all nodes")


def find_problems(
    reports: Sequence[Report], *, need_bytes: int, bandwidths: Sequence[Bandwidth] = (), minimum: float | None = None
) -> list[str]:
    """One line a problem, beginning with the node it is on. ``minimum`` is for every bandwidth, in GB/s."""
    return [*_local(reports, need_bytes), *_clocks(reports), *_slow(bandwidths, minimum)]


def _local(reports: Sequence[Report], need_bytes: int) -> Iterator[str]:
    usual = Counter(report.device for report in reports).most_common(1)[0][0]
    short = set()
    for report in reports:
        where = f"{report.host}: rank {report.rank}"
        if report.problem:
            yield f"{where}: {report.problem}"
        if report.device != usual:
            yield f"{where} has {report.device}, most ranks have {usual}"
        if report.free_memory < MIN_FREE_MEMORY:
            yield f"{where}: only {report.free_memory:.0%} of the memory of {report.device} is free; who else uses it?"
        if report.free_bytes < need_bytes:
            short.add(report.host)
    for host in sorted(short):
        free = min(report.free_bytes for report in reports if report.host == host)
        yield f"{host}: {free / 2**30:.1f} GiB free for the run, checkpoints need {need_bytes / 2**30:.1f}"


def _clocks(reports: Sequence[Report]) -> Iterator[str]:
    middle = statistics.median(report.clock for report in reports)
    for host in dict.fromkeys(report.host for report in reports):
        offset = max((report.clock - middle for report in reports if report.host == host), key=abs)
        if abs(offset) > MAX_CLOCK_SECONDS:
            yield f"{host}: its clock is {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}"


def _slow(bandwidths: Sequence[Bandwidth], minimum: float | None) -> Iterator[str]:
    for kind in dict.fromkeys(bandwidth.kind for bandwidth in bandwidths):
        measured = [bandwidth for bandwidth in bandwidths if bandwidth.kind == kind]
        floor, why = minimum or 0.0, "PREFLIGHT_MIN_GBPS"
        if len(measured) >= _MIN_SAMPLES:
            middle = statistics.median(bandwidth.gbps for bandwidth in measured)
            if SLOW * middle > floor:
                floor, why = SLOW * middle, f"half of the median {middle:.2f}"
        slow = [bandwidth for bandwidth in measured if bandwidth.gbps < floor]
        fine = {host for bandwidth in measured if bandwidth.gbps >= floor for host in bandwidth.hosts}
        guilty: dict[str, float] = {}
        for bandwidth in slow:
            # A node that is fast with another neighbour is not the one that is slow.
            for host in [host for host in bandwidth.hosts if host not in fine] or bandwidth.hosts:
                guilty[host] = min(bandwidth.gbps, guilty.get(host, bandwidth.gbps))
        for host, gbps in guilty.items():
            yield f"{host}: all-reduce {kind} {gbps:.2f} GB/s, below {floor:.2f} ({why})"


def table(reports: Sequence[Report], bandwidths: Sequence[Bandwidth]) -> list[str]:
    """Lines for the log: what every node has, and how fast it talks."""
    lines = []
    middle = statistics.median(report.clock for report in reports)
    for host in dict.fromkeys(report.host for report in reports):
        own = [report for report in reports if report.host == host]
        devices = ", ".join(f"{count} x {name}" for name, count in Counter(report.device for report in own).items())
        offset = max((report.clock - middle for report in own), key=abs)
        free = min(report.free_bytes for report in own) / 2**30
        lines.append(f"  {host}: {devices}, {free:.0f} GiB free, clock {offset:+.3f} s")
    for kind in dict.fromkeys(bandwidth.kind for bandwidth in bandwidths):
        rates = [bandwidth.gbps for bandwidth in bandwidths if bandwidth.kind == kind]
        lines.append(f"  all-reduce {kind}: {min(rates):.2f} to {max(rates):.2f} GB/s over {len(rates)}")
    return lines
