"""Plots with one curve a run, over the data tokens that each has consumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llada_mega.reporting.axes import draw_series, mark_nonfinite, series, tick_formats
from llada_mega.reporting.comparison import validation_as_evaluation
from llada_mega.reporting.formatting import finite
from llada_mega.reporting.palette import spread
from llada_mega.reporting.record import Row, RunRecord
from llada_mega.reporting.runs import Runs, slug
from llada_mega.reporting.svg import Plot, colour, new_figure, plot_style, series_colour, to_svg
from llada_mega.reporting.time_plots import time_by_run

WIDE, HALF, THIRD = 998, 468, 292

# key of a row, title, unit, logarithmic where it spreads
_MACHINE = (
    ("grad_norm", "Gradient norm", "L2 norm", True),
    ("lr", "Learning rate", "", False),
    ("tokens_per_s", "Throughput", "data tokens a second", False),
    ("tflops_per_device", "TFLOP/s per device", "TFLOP/s", False),
    ("mfu", "Model FLOPs utilisation", "share of peak", False),
    ("memory_gib", "Memory", "GiB", False),
    ("expert_load_max_over_mean", "Expert load", "busiest expert over mean", False),
    ("goodput", "Goodput", "share of all time", False),
)


def overlay_plots(runs: Runs) -> list[Plot]:
    """Every plot that at least one run has data for."""
    with plot_style():
        plots = [_training(runs), *_held_out(runs)]
        plots += [_machine(runs, *entry) for entry in _MACHINE]
        plots.append(time_by_run(runs))
        return [plot for plot in plots if plot is not None]


def run_indices(runs: Runs) -> dict[str, int]:
    """Index of each run's colour."""
    return dict(zip(runs, spread(range(len(runs))).values(), strict=True))


def over_tokens(record: RunRecord, rows: Sequence[Row], key: str) -> list[Row]:
    """Rows with ``key``, whose ``step`` is the tokens that the run had consumed at their step.

    Validation rows know their step only; what lies between two logged steps is interpolated. Without token counts the
    steps stay.
    """
    steps, tokens = series(record.training, "consumed_tokens")
    found = [row for row in rows if key in row]
    if not steps.size:
        return found
    at = np.interp([row["step"] for row in found], [0, *steps], [0, *tokens])
    return [{"step": float(x), key: row[key]} for x, row in zip(at, found, strict=True)]


def _training(runs: Runs) -> Plot | None:
    return _curves(
        runs,
        {name: over_tokens(record, record.training, "ce_masked") for name, record in runs.items()},
        "ce_masked", "Training CE per masked token", "nats",
        "Faint: every logged step. Bold: running mean.", "losses", "wide",
    )  # fmt: skip


def _held_out(runs: Runs) -> list[Plot | None]:
    sizes = sorted(
        {int(size) for record in runs.values() for row in record.validation
         for size in validation_as_evaluation(row)["block_sizes"]}
    )  # fmt: skip
    keys = [(f"valid/block_{size}/ce_masked", f"Held-out CE, block {size}", "nats per masked token") for size in sizes]
    keys.append(("valid/ar_nll", "Held-out AR loss", "nats per token"))
    return [
        _curves(
            runs, {name: over_tokens(record, record.validation, key) for name, record in runs.items()},
            key, title, unit, "On held-out documents.", "losses", "third",
        )
        for key, title, unit in keys
    ]  # fmt: skip


def _machine(runs: Runs, key: str, title: str, unit: str, log: bool) -> Plot | None:
    rows = {name: over_tokens(record, record.training, key) for name, record in runs.items()}
    return _curves(runs, rows, key, title, unit, "", "machine", "half", log=log)


def _curves(
    runs: Runs, rows: dict[str, list[Row]], key: str, title: str, unit: str, caption: str, group: str, width: str,
    *, log: bool = False,
) -> Plot | None:  # fmt: skip
    values = [value for found in rows.values() for row in found if (value := finite(row[key])) is not None]
    if not values:
        return None
    figure, (axis,) = new_figure(*{"wide": (WIDE, 300), "half": (HALF, 250), "third": (THIRD, 230)}[width])
    for name, index in run_indices(runs).items():
        tint = series_colour(index)
        if width == "third":
            steps, heights = series(rows[name], key)
            axis.plot(steps, heights, color=tint, marker="o", markersize=4.5)
        else:
            draw_series(axis, rows[name], key, tint)
        mark_nonfinite(axis, rows[name], key, colour("warn"))
    if log and min(values) > 0 and max(values) > 30 * min(values):
        axis.set_yscale("log")
        axis.grid(False, which="minor")
    elif group == "machine":
        axis.set_ylim(bottom=0)
    axis.set_title(unit, loc="left", fontsize=11, color=colour("muted"), pad=8)
    tick_formats(axis)
    has_tokens = all(series(record.training, "consumed_tokens")[0].size for record in runs.values())
    axis.set_xlabel("data tokens" if has_tokens else "step")
    return Plot(title, caption, to_svg(figure, slug(title), f"{title} by run"), group, width)
