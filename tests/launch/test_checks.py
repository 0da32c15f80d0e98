"""The preflight's judgement: what is wrong, and on which node."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launch.checks import Bandwidth, Report, find_problems, table
from launch.preflight import all_reduce_rounds

NAMES = [f"n{index}" for index in range(1, 7)]


def reports(**changed: object) -> list[Report]:
    """Two ranks on each of six nodes; ``n3__clock=7`` changes a field of both ranks of n3."""
    found = [
        Report(name, 2 * node + local, "H100", 1.0, "", 100, 50.0)
        for node, name in enumerate(NAMES)
        for local in (0, 1)
    ]
    for key, value in changed.items():
        host, field = key.split("__")
        for report in found:
            if report.host == host:
                setattr(report, field, value)
    return found


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({}, []),
        ({"n2__problem": "CUDA error"}, ["n2: rank 2: CUDA error", "n2: rank 3: CUDA error"]),
        (
            {"n6__device": "cpu"},
            ["n6: rank 10 has cpu, most ranks have H100", "n6: rank 11 has cpu, most ranks have H100"],
        ),
        (
            {"n1__free_memory": 0.4},
            [f"n1: rank {r}: only 40% of the memory of H100 is free; who else uses it?" for r in (0, 1)],
        ),
        ({"n4__free_bytes": 1}, ["n4: 0.0 GiB free for the run, checkpoints need 0.0"]),
        ({"n5__clock": 57.25}, ["n5: its clock is 7.2 s ahead"]),
        ({"n5__clock": 40.0}, ["n5: its clock is 10.0 s behind"]),
    ],
)
def test_local_problems_name_the_node(changed: dict[str, object], problems: list[str]) -> None:
    assert find_problems(reports(**changed), need_bytes=100) == problems


def measure(slow_hosts: Sequence[str], nodes: Sequence[str] = NAMES) -> list[Bandwidth]:
    """What all rounds of the preflight would measure if ``slow_hosts`` were ten times slower than the others."""
    found = []
    for _, groups in all_reduce_rounds(len(nodes), 2):
        for ranks in groups:
            hosts = tuple(dict.fromkeys(nodes[rank // 2] for rank in ranks))
            found.append(Bandwidth(hosts, 10.0 if set(hosts) & set(slow_hosts) else 100.0))
    return found


@pytest.mark.parametrize("slow", NAMES)
def test_a_slow_node_is_told_from_its_neighbours(slow: str) -> None:
    problems = find_problems(reports(), need_bytes=0, bandwidths=measure([slow]))
    named = {line.split(":")[0] for line in problems}
    assert named == {slow}
    assert {"inside a node", "between two nodes"} == {
        line.split("all-reduce ")[1].split(" 10.00")[0] for line in problems
    }


def test_even_bandwidths_are_fine_unless_a_minimum_is_asked_for() -> None:
    every = measure(NAMES)
    assert find_problems(reports(), need_bytes=0, bandwidths=every) == []
    problems = find_problems(reports(), need_bytes=0, bandwidths=every, minimum=20.0)
    assert {line.split(":")[0] for line in problems} == set(NAMES)
    assert all("below 20.00 (PREFLIGHT_MIN_GBPS)" in line for line in problems)


def test_two_nodes_have_no_median() -> None:
    assert find_problems(reports(), need_bytes=0, bandwidths=measure(["n1"], NAMES[:2])) == []


def test_rounds_pair_every_node_with_all_its_neighbours() -> None:
    for nodes in range(1, 8):
        rounds = list(all_reduce_rounds(nodes, 2))
        pairs = [{rank // 2 for rank in group} for what, groups in rounds if "neighbours" in what for group in groups]
        assert len({frozenset(pair) for pair in pairs}) == len(pairs)
        neighbours = 0 if nodes == 1 else 1 if nodes == 2 else 2
        assert [sum(node in pair for pair in pairs) for node in range(nodes)] == [neighbours] * nodes
        for _, groups in rounds:
            ranks = [rank for group in groups for rank in group]
            assert len(ranks) == len(set(ranks))  # groups of a round can run at the same time
    assert list(all_reduce_rounds(1, 1)) == []


def test_the_table_has_a_line_for_every_node() -> None:
    lines = table(reports(), measure([]))
    assert [line.split(":")[0].strip() for line in lines[:6]] == NAMES
    assert "2 x H100" in lines[0]
    assert "all-reduce between two nodes: 100.00 to 100.00 GB/s over 6" in lines[7]
