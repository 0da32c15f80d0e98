"""The HTML report, parsed: what it shows of whole, unfinished, tiny and damaged runs, and that it fetches nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_mega.errors import DataError
from llada_mega.reporting.formatting import MINUS, MISSING
from llada_mega.reporting.palette import SERIES_LIGHT, spread
from llada_mega.reporting.report import write_report
from tests.reporting.fake_run import config, training_rows, write_fake_run, write_json, write_rows
from tests.reporting.page_parser import Page, read_page

CORE_PLOTS = {
    "Training loss by stage",
    "Loss by noise level",
    "MASK embedding",
    "Gradient norm",
    "Learning rate",
    "Throughput",
    "Mask ratio",
}
EN_SPACE = "\N{EN SPACE}"
VALIDATION_PLOTS = {"Held-out denoising loss", "Held-out accuracy", "AR loss"}


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.partial"))
    return read_page(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(write_fake_run(tmp_path_factory.mktemp("runs") / "quickstart"))


def test_header(whole: Page) -> None:
    assert whole.inside("h1") == ["quickstart"]
    assert "finished after 60 steps" in whole.text
    for fact in ("134.5M", "1 → 4 → 8", "6 min 43 s", "3.41 GiB", "61.4K tokens", "30 layers"):
        assert fact in whole.text
    assert "Held-out CE, block 8 5.830" in whole.text
    assert f"{MINUS}3.320 from 9.150" in whole.text
    assert "AR loss kept 3.118" in whole.text


def test_every_plot_is_there_and_named(whole: Page) -> None:
    assert set(whole.titles) >= CORE_PLOTS | VALIDATION_PLOTS | {"Memory", "TFLOP/s per device"}
    figures = [tag for tag, _ in whole.tags if tag == "figure"]
    drawings = [attributes for tag, attributes in whole.tags if tag == "svg"]
    assert len(figures) == len(drawings) == 13
    assert all(attributes["aria-label"] and attributes["viewbox"] for attributes in drawings)


def test_stages_are_marked_in_the_colours_of_their_block_sizes(whole: Page) -> None:
    for size, index in spread([1, 4, 8]).items():
        assert f"block {size} · bdlm" in whole.inside("text")
        assert f"fill: var(--series-{index})" in whole.html  # the band
        assert f"stroke: var(--series-{index})" in whole.html  # the curve
        assert f"--series-{index}: {SERIES_LIGHT[index]}" in whole.html  # and the page defines it
    assert "prefers-color-scheme: dark" in whole.html


def test_plots_use_the_pages_colours_and_font_only(whole: Page) -> None:
    plots = whole.html.split("<figure")[1:]
    for plot in plots:
        drawing = plot[plot.index("<svg") : plot.index("</svg>")]
        assert "font-family" not in drawing
        assert "#0" not in drawing.replace("url(#", "").replace('href="#', "")


def test_numbers_in_plots_keep_their_digits(tmp_path: Path) -> None:
    write_rows(tmp_path, [{**row, "mask_embedding_rms": 0.12345} for row in training_rows([8], 4)])
    assert f"MASK row{EN_SPACE}0.123" in report(tmp_path).inside("text")


def test_before_and_after(whole: Page) -> None:
    assert "Before and after" in whole.inside("h2")
    cells = whole.inside("td") + whole.inside("b") + whole.inside("span")
    for value in ("9.150", "5.830", "6.130", "3.770", "3.152", "3.118", f"{MINUS}3.320", "+10.0 pt"):
        assert value in cells


def test_the_sample_and_its_trajectory(whole: Page) -> None:
    assert "A generated sample" in whole.inside("h2")
    tokens = [text for text in whole.inside("span") if text in {"is", "short", "list:", "iterable,"}]
    assert len(tokens) >= 8  # in the text and in the steps
    assert whole.with_class("masked") > 20
    assert whole.with_class("fresh") == 18  # every generated token is filled in once
    assert "18 tokens took 12 denoising steps" in whole.text


def test_the_stage_table_and_the_configuration(whole: Page) -> None:
    for cell in ("block_4", f"21 {MISSING} 40", "20.5K"):
        assert cell in whole.inside("td")
    assert "num_layers: 30" in whole.text
    assert "clip_grad: 1.0" in whole.text


def test_moe_runs_show_expert_load(tmp_path: Path) -> None:
    page = report(write_fake_run(tmp_path / "moe", moe=True, block_sizes=(4, 8)))
    assert {"Expert load", "Dead experts"} <= set(page.titles)
    assert "active per token" in page.text


def test_a_run_still_going_on(tmp_path: Path) -> None:
    page = report(write_fake_run(tmp_path / "going", finished=False))
    assert "unfinished: 34 of 60 steps" in page.text
    assert "First and last validation" in page.inside("h2")
    assert "A generated sample" not in page.inside("h2")
    assert "≈" in page.text


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(tmp_path: Path, steps: int) -> None:
    write_rows(tmp_path, training_rows([8], steps))
    page = report(tmp_path)
    assert set(page.titles) >= CORE_PLOTS
    assert "config.yaml is missing" in page.text


def test_without_validation(tmp_path: Path) -> None:
    write_rows(tmp_path, training_rows([1, 8], 40))
    page = report(tmp_path)
    assert not VALIDATION_PLOTS & set(page.titles)
    assert "Cross entropy of the training steps by the share t" in page.text
    assert "Training CE per masked token" in page.text
    assert "Before and after" not in page.text


def test_one_validation_is_shown_without_a_before(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", steps=6, block_sizes=(8,), finished=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_rows(run, [row for row in rows if "loss" in row or row["step"] == 2])
    page = report(run)
    assert "Held-out evaluation" in page.inside("h2")
    assert "change" not in page.inside("th")


def test_an_evaluation_before_training_only(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    for name in ("eval_after.json", "summary.json"):
        (run / name).unlink()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_rows(run, [row for row in rows if "loss" in row])
    page = report(run)
    assert "Held-out evaluation" in page.inside("h2")
    assert "before training" in page.inside("th")
    assert "9.150" in page.inside("b")


def test_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(config("early", [1, 8], 10)), encoding="utf-8")
    page = report(tmp_path)
    assert "no step logged yet" in page.text
    assert "134.5M" in page.text
    assert not [tag for tag, _ in page.tags if tag == "svg"]


def test_notes_and_warnings(tmp_path: Path) -> None:
    rows = training_rows([8], 12)
    rows[7]["loss"] = rows[7]["ce_masked"] = float("nan")
    write_rows(tmp_path, [*rows, {"step": 9, "warning": "loss 9.1 is above 3 times the median"}])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write('{"step": 13, "lo')
    page = report(tmp_path)
    assert "step 9: loss 9.1 is above 3 times the median" in page.inside("li")
    assert "The loss was not finite at step 8." in page.inside("li")
    assert "The last line of metrics.jsonl is incomplete and was left out." in page.inside("li")
    assert "nan" not in page.html.lower().split("<main>")[1]


def test_what_comes_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    run = write_fake_run(tmp_path / "run", steps=12)
    write_json(run / "sample.json", {"prompt": evil, "text": evil, "block_size": 1, "steps": [[evil], ["\n"], [""]]})
    settings = config(evil, [1, 8], 12)
    settings["curriculum"]["stages"][0]["name"] = evil
    (run / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    page = report(run)  # read_page refuses any script
    assert page.text.count(evil) >= 4


def test_long_runs_are_drawn_in_bins(tmp_path: Path) -> None:
    write_rows(tmp_path, training_rows([1, 8], 5000))
    page = report(tmp_path)
    assert "Training loss by stage" in page.titles
    assert len(page.html) < 900_000


def test_the_page_is_the_same_every_time(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", steps=12)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    write_rows(tmp_path, training_rows([8], 2))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        write_report(tmp_path)
