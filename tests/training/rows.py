"""Reading metrics.jsonl in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llada_mega.checkpoint.checkpoint import read_state

TIMINGS = (
    "tokens_per_s",
    "positions_per_s",
    "tflops_per_device",
    "mfu",
    "memory_gib",
    "time_share",
    "train_seconds",
    "goodput",
)


def read_rows(run_dir: Path, kind: str = "loss") -> dict[int, dict[str, Any]]:
    """Rows that have the key ``kind``, the last one of each step, without timings."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if kind in row:
            rows[row["step"]] = {key: value for key, value in row.items() if key not in TIMINGS}
    return rows


def untimed_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` without what the run measured of time."""
    state = read_state(checkpoint)
    assert set(state["callbacks"].pop("metrics")) == {"began", "step_seconds", "train_seconds"}
    return state
