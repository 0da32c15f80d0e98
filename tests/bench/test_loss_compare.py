"""The code still makes the kept loss curves, a small numeric change would be seen, and a reason is demanded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import loss_compare
from bench.loss_compare import GoldenError, differences, golden_path, read_golden, relative_differences, updated
from bench.loss_runs import METRICS, RUNS, STEPS, Curves, train

DENSE, MOE = RUNS
CURVES: Curves = {metric: [4.0, 3.0, 2.0] for metric in METRICS}


def outside(curves: Curves, golden: Curves) -> list[str]:
    return [d.metric for d in differences(curves, golden) if d.first_outside is not None]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_curves_are_those_that_are_kept(run: loss_compare.LossRun, tmp_path: Path) -> None:
    golden = read_golden(golden_path(run))["curves"]
    assert all(len(golden[metric]) == STEPS for metric in METRICS)
    found = differences(train(run, tmp_path), golden)
    assert all(d.first_outside is None for d in found), loss_compare.table({run.name: found})


@pytest.mark.parametrize("change", ["optimizer.beta2=0.951", "optimizer.weight_decay=0.11"])
def test_a_small_change_is_seen(change: str, tmp_path: Path) -> None:
    assert outside(train(DENSE, tmp_path, (change,)), read_golden(golden_path(DENSE))["curves"])


def test_each_curve_and_step_counts() -> None:
    for metric in METRICS:
        for step in range(3):
            values = list(CURVES[metric])
            values[step] *= 1 + 2 * loss_compare.TOLERANCE
            (found,) = [d for d in differences({**CURVES, metric: values}, CURVES) if d.first_outside is not None]
            assert (found.metric, found.at_step, found.first_outside) == (metric, step + 1, step + 1)
    assert not outside(CURVES, CURVES)
    assert outside({**CURVES, "loss": [4.0, float("nan"), 2.0]}, CURVES) == ["loss"]
    assert outside({**CURVES, "loss": [4.0, 3.0]}, CURVES) == ["loss"]
    assert relative_differences([1.0, 2.0], [1.0, 4.0]).tolist() == [0.0, 0.5]


def test_an_update_says_why(tmp_path: Path) -> None:
    first = updated(None, DENSE, CURVES, "the first")
    halved = {**CURVES, "loss": [2.0, 1.5, 1.0]}
    second = updated(first, DENSE, halved, "the loss is halved")
    assert [entry["reason"] for entry in second["history"]] == ["the first", "the loss is halved"]
    assert second["history"][-1]["largest_change"] == {"loss": 0.5, "ce_masked": 0.0, "grad_norm": 0.0}
    assert "llada-mega train 'model=tiny'" in second["command"] and {"torch", "megatron-core"} < set(second["versions"])
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(second))
    assert read_golden(path) == second


def test_curves_that_were_edited_by_hand_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    golden = updated(None, DENSE, CURVES, "the first")
    golden["curves"] = {**CURVES, "loss": [4.0, 3.0, 2.5]}
    path.write_text(json.dumps(golden))
    with pytest.raises(GoldenError, match="changed by hand"):
        read_golden(path)


@pytest.mark.parametrize("arguments", [["--update"], ["--reason", "because"], ["--update", "--reason", ""]])
def test_no_update_without_a_reason(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loss_compare", *arguments])
    assert loss_compare.main() == 2
    assert "must say why" in capsys.readouterr().err
