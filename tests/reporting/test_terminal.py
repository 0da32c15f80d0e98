"""Tables for the terminal, as printed; and how numbers read."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from llada_mega.reporting.formatting import MINUS, MISSING, duration, finite, short_count, signed, significant
from llada_mega.reporting.terminal import render_before_after, render_eval
from tests.reporting.fake_run import evaluation


def lines(table: Table) -> list[str]:
    console = Console(width=100, file=io.StringIO(), no_color=True)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def line_with(text: list[str], *parts: str) -> str:
    (line,) = [line for line in text if all(part in line for part in parts)]
    return line


def test_before_and_after() -> None:
    text = lines(render_before_after(evaluation(0.0), evaluation(1.0)))
    assert max(map(len, text)) <= 80
    row = line_with(text, "block 8", "Masked CE")
    assert row.index("9.150") < row.index("5.830") < row.index(f"{MINUS}3.320 ▲")
    assert "+21.7 pt ▲" in line_with(text, "block 1", "Accuracy")
    assert f"{MINUS}0.034 =" in line_with(text, "AR loss")
    worse = lines(render_before_after(evaluation(1.0), evaluation(0.0)))
    assert "+3.320 ▼" in line_with(worse, "block 8", "Masked CE")


def test_bars_are_as_long_as_the_losses() -> None:
    text = lines(render_before_after(evaluation(0.0), evaluation(1.0)))
    solid = [line_with(text, f"block {size}", "Masked CE").count("█") for size in (1, 4, 8)]
    assert solid == [round(18 * value / 9.15) for value in (3.77, 4.96, 5.83)]
    whole = line_with(text, "block 8", "Masked CE")
    assert whole.count("█") + whole.count("─") == 18


def test_one_side_may_be_missing() -> None:
    row = line_with(lines(render_before_after({}, evaluation(1.0))), "block 8", "Masked CE")
    assert MISSING in row
    assert "5.830" in row
    assert len(lines(render_before_after({}, {}))) >= 3


def test_one_evaluation() -> None:
    text = lines(render_eval(evaluation(1.0)))
    header = line_with(text, "block 1", "block 4", "block 8")
    row = line_with(text, "masked CE", "3.770")
    assert header.index("block 8") <= row.index("5.830") <= header.index("block 8") + 7
    assert "6.821" in line_with(text, "t 0.75-1.00")
    assert "32.9 %" in line_with(text, "accuracy")
    assert "3.118" in line_with(text, "AR loss")


def test_evaluations_with_few_or_odd_values() -> None:
    text = lines(render_eval({"ar_nll": 3.0, "block_sizes": {}}))
    assert "3.000" in line_with(text, "AR loss")
    nothing = {"ar_nll": None, "block_sizes": {"8": {"ce_masked": None, "by_noise": {"0-0.5": {"ce_masked": 2.0}}}}}
    text = lines(render_eval(nothing))
    assert MISSING in line_with(text, "accuracy")
    assert "2.000" in line_with(text, "t 0-0.5")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.24, "5.2 s"), (59.97, "1 min 00 s"), (402.9, "6 min 43 s"), (3725, "1 h 02 min"), (90000, "1 d 01 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(9999, "9,999"), (61440, "61.4K"), (134515008, "134.5M"), (16255638528, "16.3B"), (123456, "123.5K")],
)
def test_short_counts(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.14159, "3.142"), (123.456, "123.5"), (0.0001, "1.00e-04"), (0, "0"), (None, MISSING)]
)
def test_significant(value: float | None, text: str) -> None:
    assert significant(value) == text


def test_what_is_no_number() -> None:
    assert [finite(value) for value in (float("nan"), float("inf"), None, "3", True)] == [None] * 5
    assert finite(3) == 3.0
    assert signed(-0.5) == f"{MINUS}0.500"
