"""Where the time went (``time_share`` of the rows): over the steps of one run, and of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from llada_mega.reporting.axes import tick_formats
from llada_mega.reporting.formatting import finite
from llada_mega.reporting.palette import spread
from llada_mega.reporting.record import Row, RunRecord
from llada_mega.reporting.svg import Plot, colour, new_figure, series_colour, to_svg

WIDE = 998
MAX_BINS = 200
OTHER = "other"
_CAPTION = (
    "Shares of all the time of the first rank. Communication is what computation had to wait for; collectives inside "
    "layers belong to forward and backward."
)


def phases_of(rows: Sequence[Row]) -> list[str]:
    """Phases in the order in which rows name them."""
    return list(dict.fromkeys(phase for row in rows for phase in _shares(row)))


def mean_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Mean share of each phase over the rows, {} when none has shares."""
    shares = [found for row in rows if (found := _shares(row))]
    return {phase: sum(row.get(phase, 0.0) for row in shares) / len(shares) for phase in phases_of(rows)}


def time_by_step(record: RunRecord) -> Plot | None:
    """Phases stacked over the steps; None when the run has no shares."""
    rows = [row for row in record.training if _shares(row)]
    phases = phases_of(rows)
    if not rows:
        return None
    parts = [part for part in np.array_split(np.arange(len(rows)), min(len(rows), MAX_BINS)) if part.size]
    steps = np.asarray([np.mean([rows[index]["step"] for index in part]) for part in parts])
    means = [mean_shares([rows[index] for index in part]) for part in parts]
    heights = np.asarray([[mean.get(phase, 0.0) for mean in means] for phase in phases])
    if steps.size == 1:  # an area needs two points
        steps, heights = np.asarray([steps[0] - 0.5, steps[0] + 0.5]), np.repeat(heights, 2, axis=1)
    figure, (axis,) = new_figure(WIDE, 250)
    axis.stackplot(steps, heights, colors=_colours(phases), linewidth=0, alpha=0.85)
    axis.set_xlim(steps[0], steps[-1])
    tick_formats(axis)
    _share_axis(axis, phases)
    axis.set_xlabel("step")
    return Plot("Where the time goes", _CAPTION, to_svg(figure, "time", "Shares of time by step"), "machine", "wide")


def time_by_run(runs: Mapping[str, RunRecord]) -> Plot | None:
    """One bar a run, the mean over its rows; None when no run has shares."""
    shares = {name: mean for name, record in runs.items() if (mean := mean_shares(record.training))}
    if not shares:
        return None
    phases = list(dict.fromkeys(phase for mean in shares.values() for phase in mean))
    figure, (axis,) = new_figure(WIDE, 90 + 34 * len(shares))
    left = np.zeros(len(shares))
    for phase, tint in zip(phases, _colours(phases), strict=True):
        widths = np.asarray([mean.get(phase, 0.0) for mean in shares.values()])
        axis.barh(list(shares), widths, left=left, color=tint, height=0.62, alpha=0.85, label=phase)
        left += widths
    axis.invert_yaxis()
    axis.grid(False)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.tick_params(axis="y", labelcolor=colour("ink"), labelsize=12)
    _legend(axis, phases)
    return Plot("Where the time goes", _CAPTION, to_svg(figure, "time", "Shares of time by run"), "machine", "wide")


def _shares(row: Row) -> dict[str, float]:
    shares = row.get("time_share")
    found = {phase: finite(value) for phase, value in shares.items()} if isinstance(shares, dict) else {}
    return {phase: value for phase, value in found.items() if value is not None}


def _colours(phases: Sequence[str]) -> list[str]:
    named = [phase for phase in phases if phase != OTHER]
    index = spread(range(len(named)))
    return [colour("grid") if phase == OTHER else series_colour(index[named.index(phase)]) for phase in phases]


def _share_axis(axis: Axes, phases: Sequence[str]) -> None:
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    _legend(axis, phases)


def _legend(axis: Axes, phases: Sequence[str]) -> None:
    handles = [axis.plot([], [], color=tint, linewidth=7)[0] for tint in _colours(phases)]
    axis.legend(handles, phases, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(phases), handlelength=0.8)
