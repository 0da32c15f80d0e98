"""The same training steps under tensor, sequence, pipeline, expert and data parallelism, on gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.latest]
ROOT = Path(__file__).resolve().parents[2]

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dense": ("dense", 1, {}),
    "dense-dp2": ("dense", 2, {}),
    "dense-dp2-distributed-optimizer": ("dense", 2, {"distributed_optimizer": True}),
    "dense-tp2": ("dense", 2, {"tp": 2}),
    "dense-tp2-sp": ("dense", 2, {"tp": 2, "sp": True}),
    "dense-pp2-vp2": ("dense", 2, {"pp": 2, "vp": 2}),
    "tied": ("tied", 1, {}),
    "tied-pp2": ("tied", 2, {"pp": 2}),
    "tied-tp2-recompute": ("tied", 2, {"tp": 2, "recompute": "full"}),
    "moe": ("moe", 1, {}),
    "moe-ep2": ("moe", 2, {"ep": 2}),
    "moe-ep2-allgather": ("moe", 2, {"ep": 2, "dispatcher": "allgather"}),
    "moe-tp2-sp-ep2": ("moe", 2, {"tp": 2, "sp": True, "ep": 2}),
    "moe-pp2": ("moe", 2, {"pp": 2, "recompute": "full"}),
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """All layouts, trained by one process that imports once and forks."""
    cases = [
        {"name": name, "model": model, "world_size": world_size, "parallel": parallel}
        for name, (model, world_size, parallel) in CASES.items()
    ]
    command = [sys.executable, "-m", "tests.parallel.layout_worker", json.dumps(cases)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases), finished.stderr[-4000:]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", [name for name in CASES if "-" in name])
def test_layout_gives_the_numbers_of_one_process(results: dict[str, dict[str, Any]], name: str) -> None:
    result, single = results[name], results[CASES[name][0]]
    assert "error" not in single, single.get("error")
    assert "error" not in result, result.get("error")
    assert result["losses"] == pytest.approx(single["losses"], rel=2e-5)
    assert result["gradient_norms"] == pytest.approx(single["gradient_norms"], rel=2e-4)
    if "pp" not in CASES[name][2]:  # a pipeline stage knows the loads of its own layers only
        assert result["loads"] == single["loads"]
