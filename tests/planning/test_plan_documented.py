"""The figures that docs/planning.md prints, planned again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llada_mega.config.compose import compose
from llada_mega.planning.options import PlanOptions
from llada_mega.planning.plan import Planner, make_plan, prepare
from llada_mega.planning.results import Plan
from llada_mega.planning.search import candidates

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text()
DEVICES = ("h100", "h200", "b200", "gb200")


def planned(experiment: str, gpus: int, *overrides: str) -> Plan:
    options = compose(PlanOptions, [f"experiment={experiment}", f"gpus={gpus}", *overrides])
    prepare(options)
    return make_plan(options)


def cells(first: str) -> list[str]:
    """Of the row of a table that starts so, without the first one."""
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


@pytest.mark.parametrize("experiment", ["cpt_16b", "cpt_100b"])
def test_the_page_has_the_days_of_both_plans(experiment: str) -> None:
    found = re.search(rf"\| `{experiment}` on (\d+) devices, (\d+) B tokens", PAGE)
    assert found is not None
    plans = [planned(experiment, int(found[1]), f"hardware.device={device}") for device in DEVICES]
    printed = [cell.removesuffix(" days") for cell in cells(f"`{experiment}` on")]
    assert printed == [f"{plan.days:.1f}" for plan in plans]
    assert all(plan.fits for plan in plans)
    assert f"{sum(stage.tokens for stage in plans[0].stages) / 1e9:.0f}" == found[2]
    shares = re.search(r"(\d+) to (\d+) % MFU", PAGE)
    assert shares is not None
    assert all(int(shares[1]) <= round(100 * plan.mean_mfu) <= int(shares[2]) for plan in plans)


@pytest.mark.full
def test_the_page_has_the_best_layout_for_each_number_of_ranks_that_share_experts() -> None:
    options = compose(PlanOptions, ["experiment=cpt_100b", "gpus=512"])
    prepare(options)
    planner, days = Planner(options), dict.fromkeys(map(int, cells("`ep`")), float("inf"))
    for parallel, micro in candidates(options, planner.device.node_size, planner.implementation):
        if parallel.ep in days and all(rank.fits for rank in planner.memory(parallel, micro, 512)):
            days[parallel.ep] = min(days[parallel.ep], planner.days(parallel, micro, 512))
    assert cells("days |") == [f"{value:.2f}" for value in days.values()]
