"""Several runs on one page: results, differences of the configurations, curves over tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llada_mega.errors import DataError
from llada_mega.reporting.formatting import MISSING
from llada_mega.reporting.overlay import over_tokens
from llada_mega.reporting.palette import spread
from llada_mega.reporting.record import RunRecord, read_run
from llada_mega.reporting.report import write_comparison, write_report
from llada_mega.reporting.runs import config_differences, read_runs, results
from llada_mega.reporting.time_plots import mean_shares
from tests.reporting.fake_run import training_rows, write_fake_run, write_rows
from tests.reporting.page_parser import Page, read_page


def record(config: dict[str, object]) -> RunRecord:
    return RunRecord(Path(), config, training=[], validation=[], stages=[])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A quickstart, one with another learning rate that is still going on, and a mixture of experts."""
    root = tmp_path_factory.mktemp("runs")
    first, second = write_fake_run(root / "first"), write_fake_run(root / "second", finished=False)
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["optimizer"]["lr"] = 3e-4
    config["curriculum"]["stages"][1]["block_size"] = 2
    config["logging"]["wandb_group"] = "sweep"
    (second / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return [first, second, write_fake_run(root / "moe", moe=True, block_sizes=(4, 8))]


@pytest.fixture(scope="module")
def whole(runs: list[Path]) -> Page:
    path = write_comparison(runs)
    assert path == runs[0].parent / "comparison.html"
    return read_page(path)


def test_keys_that_differ_and_no_others(runs: list[Path]) -> None:
    differences = dict(config_differences(read_runs(runs[:2])))
    assert differences == {
        "optimizer.lr": ["0.0001", "0.0003"],
        "curriculum.stages[1].block_size": ["4", "2"],
        "logging.wandb_group": [MISSING, "sweep"],
    }


def test_values_are_shown_as_one_types_them() -> None:
    left = {"a": None, "b": True, "c": [1, 2], "d": "x", "run": {"name": "l", "dir": "l"}, "stages": [{"n": 1}]}
    right = {"a": 0, "b": False, "c": [1], "d": "y", "run": {"name": "r", "dir": "r"}, "stages": [{"n": 1}, {"n": 2}]}
    assert config_differences({"left": record(left), "right": record(right)}) == [
        ("a", ["null", "0"]),
        ("b", ["true", "false"]),
        ("c", ["[1, 2]", "[1]"]),
        ("d", ["x", "y"]),
        ("stages[1].n", [MISSING, "2"]),
    ]


def test_the_table_of_results(runs: list[Path]) -> None:
    table = dict(results(read_runs(runs)))
    assert table["steps"] == ["60", "34", "60"]
    assert table["state"][1] == "unfinished: 34 of 60 steps"
    assert table["held-out CE, block 8"][0] == "5.830"
    assert table["dead experts"][:2] == [MISSING, MISSING] and table["dead experts"][2] != MISSING
    assert "MFU" not in table  # no run has one


def test_the_page(whole: Page, runs: list[Path]) -> None:
    assert whole.problems == []
    assert whole.inside("h1") == ["3 runs"]
    for name in ("first", "second", "moe", "optimizer.lr", "curriculum.stages[1].block_size"):
        assert name in whole.text
    expected = {"Training CE per masked token", "Held-out CE, block 8", "Held-out AR loss", "Gradient norm"}
    assert set(whole.titles) >= expected | {"Throughput", "Memory", "Where the time goes", "Expert load"}
    for index in spread(range(3)).values():
        assert f"stroke: var(--series-{index})" in whole.html
        assert f"--tint: var(--series-{index})" in whole.html
    assert "http" not in whole.html.replace("http://www.w3.org", "")


def test_curves_are_over_tokens(tmp_path: Path) -> None:
    """Two rows of validation between logged steps of 1024 tokens each."""
    rows = training_rows([8], 10)
    validation = [{"step": step, "valid/ar_nll": 3.0} for step in (0, 5, 10)]
    write_rows(tmp_path, [row for row in rows if row["step"] % 2 == 0] + validation)
    run = read_run(tmp_path)
    assert [row["step"] for row in over_tokens(run, run.validation, "valid/ar_nll")] == [0, 5 * 1024, 10 * 1024]
    assert [row["step"] for row in over_tokens(run, run.training, "loss")] == [2048, 4096, 6144, 8192, 10240]


def test_names_that_tell_runs_apart(tmp_path: Path) -> None:
    paths = [write_fake_run(tmp_path / place / "run") for place in ("a", "b")]
    for path in paths:
        (path / "config.yaml").write_text("run: {name: run}\n")
    assert list(read_runs(paths)) == ["a/run", "b/run"]
    with pytest.raises(DataError, match="given twice"):
        read_runs([paths[0], paths[0]])


def test_the_same_configuration(tmp_path: Path) -> None:
    paths = [write_fake_run(tmp_path / name) for name in ("a", "b")]
    page = read_page(write_comparison(paths, tmp_path / "out.html"))
    assert "The configurations are the same, name and directory aside." in page.text


def test_runs_without_a_step(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"run: {{name: {name}}}\n")
        paths.append(tmp_path / name)
    page = read_page(write_comparison(paths))
    assert "no step logged yet" in page.text and page.problems == []


def test_time_in_the_report_of_one_run(runs: list[Path]) -> None:
    page = read_page(write_report(runs[0]))
    assert "Where the time goes" in page.titles
    assert {"forward", "backward", "data"} <= set(page.inside("text"))


def test_mean_shares() -> None:
    rows = [{"time_share": {"a": 0.5, "b": 0.5}}, {"loss": 1.0}, {"time_share": {"a": 1.0}}, {"time_share": None}]
    assert mean_shares(rows) == {"a": 0.75, "b": 0.25}
    assert mean_shares([{}]) == {}
