"""The campaign of faults: a short one, and that it sees what it is there to see."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.fault_table import DESCRIPTION, Result, render
from bench.faults import EXACT, KINDS, Campaign, CampaignError

ROOT = Path(__file__).resolve().parents[2]


def row(step: int, **changed: Any) -> dict[str, Any]:
    return {"step": step} | dict.fromkeys(EXACT, float(step)) | changed


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    (tmp_path / "run").mkdir()
    lines = [*map(json.dumps, (row(1), row(2), row(2), row(3))), json.dumps({"step": 3, "warning": "w"}), '{"step": 4']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    return Campaign(tmp_path, tmp_path / "shard", [], random.Random(0))


def test_equal_rows_are_counted_repeated_ones_too(campaign: Campaign) -> None:
    assert campaign.check_rows({step: row(step) for step in (1, 2, 3)}) == 4


@pytest.mark.parametrize("key", EXACT)
def test_a_number_that_differs_is_seen(campaign: Campaign, key: str) -> None:
    reference = {step: row(step) for step in (1, 2, 3)}
    reference[2][key] += 1e-15 + 2**-50
    with pytest.raises(CampaignError, match=f"step 2 differs.*{key}"):
        campaign.check_rows(reference)


def test_a_missing_step_is_seen(campaign: Campaign) -> None:
    with pytest.raises(CampaignError, match="steps are missing"):
        campaign.check_rows({step: row(step) for step in (1, 2, 3, 4)})


def test_the_table_has_every_kind_once() -> None:
    assert set(DESCRIPTION) == set(KINDS)
    results = [Result(kind, f"error: rank 1 at /tmp/{n}/x", 1.0 + n, 7, 5) for n in range(2) for kind in KINDS]
    lines = render(results, 100, "make faults", 60.0).splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == len(KINDS)
    assert all(" | 2 | error: rank N at x | 1.5 (2.0) | 0.0 (0.0) | 2.0 (2) |" in line for line in rows)


@pytest.mark.full
@pytest.mark.slow
def test_a_short_campaign(tmp_path: Path) -> None:
    """One fault of each way in which faults come: from outside, planted, found at the next start."""
    kinds = ("kill_saving", "kill_launcher", "corrupt_newest", "full_disk", "nan", "hang")
    command = [sys.executable, "-m", "bench.faults", "--count", str(len(kinds)), "--directory", str(tmp_path)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(
        [*command, "--kinds", *kinds], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(kinds)} faults in" in finished.stdout
