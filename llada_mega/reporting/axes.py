"""Drawing runs into matplotlib axes: series with their running mean, stage bands, labelled curves.

Colours are given by the caller: stand-ins for CSS variables on the report's page, real ones in a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llada_mega.reporting.comparison import block_sizes, validation_as_evaluation
from llada_mega.reporting.formatting import finite, short_count, significant
from llada_mega.reporting.record import Row, RunRecord, StageSpan

MAX_POINTS = 1200  # a longer series is drawn as its mean and range in so many bins


def all_block_sizes(record: RunRecord) -> list[int]:
    """Block sizes that the run trained, validated or evaluated with, ascending: each has one colour everywhere."""
    sizes = {stage.block_size for stage in record.stages}
    sizes |= {*block_sizes(record.eval_before), *block_sizes(record.eval_after)}
    for row in record.validation:
        sizes |= {int(size) for size in validation_as_evaluation(row)["block_sizes"]}
    return sorted(sizes)


def validation_curves(record: RunRecord, key: str) -> dict[int, tuple[list[float], list[float]]]:
    """Block size -> (steps, values) of ``valid/block_<b>/<key>``."""
    curves: dict[int, tuple[list[float], list[float]]] = {}
    for row in record.validation:
        for size, values in validation_as_evaluation(row)["block_sizes"].items():
            value = finite(values.get(key))
            if value is not None:
                steps, series_values = curves.setdefault(int(size), ([], []))
                steps.append(float(row["step"]))
                series_values.append(value)
    return dict(sorted(curves.items()))


def series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) float64 of the rows where ``key`` is a finite number."""
    points = [(row["step"], value) for row in rows if (value := finite(row.get(key))) is not None]
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def recent_mean(rows: Sequence[Row], key: str) -> float:
    """Mean of the last tenth of the logged steps."""
    _, values = series(rows, key)
    recent = values[-max(len(values) // 10, 1) :]
    return float(recent.mean())


def draw_series(axis: Axes, rows: Sequence[Row], key: str, tint: str, *, smooth: bool = True) -> None:
    """A faint line of every step and a bold running mean; for a long series its range and mean by bins."""
    steps, values = series(rows, key)
    if steps.size == 0:
        return
    if steps.size == 1:
        axis.plot(steps, values, color=tint, marker="o", markersize=6)
        return
    if steps.size > MAX_POINTS:
        bins = [part for part in np.array_split(np.arange(steps.size), MAX_POINTS // 3) if part.size]
        centres = np.asarray([steps[part].mean() for part in bins])
        low, high, mean = (np.asarray([f(values[part]) for part in bins]) for f in (np.min, np.max, np.mean))
        axis.fill_between(centres, low, high, color=tint, alpha=0.16, linewidth=0)
        axis.plot(centres, mean, color=tint)
        return
    if not smooth or steps.size < 8:
        axis.plot(steps, values, color=tint, marker="o" if steps.size < 8 else "", markersize=4)
        return
    axis.plot(steps, values, color=tint, linewidth=1.2, alpha=0.35)
    axis.plot(steps, running_mean(values, max(steps.size // 8, 5)), color=tint)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over about ``window`` values, over fewer at the ends. [n] -> [n]"""
    half = window // 2
    total = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(values.size)
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    return (total[last] - total[first]) / (last - first)


def mark_nonfinite(axis: Axes, rows: Sequence[Row], key: str, tint: str) -> None:
    steps = [row["step"] for row in rows if key in row and row[key] is not None and finite(row[key]) is None]
    if steps:
        frame = axis.get_xaxis_transform()
        axis.plot(steps, [0.04] * len(steps), "x", color=tint, transform=frame, markersize=7, clip_on=False)


def tick_formats(axis: Axes) -> None:
    """Few round ticks; thousands as 10K; whole steps."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if axis.get_yscale() != "linear":
        return
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    largest = max(abs(limit) for limit in axis.get_ylim())
    if largest >= 1e4:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    elif largest < 1e-2:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else f"{value:.1e}"))


def stage_bands(
    axis: Axes, stages: Sequence[StageSpan], tints: Mapping[int, str], *, label: bool, fontsize: float = 12
) -> None:
    """Shade each stage in its block size's colour; name it above the band where there is room."""
    if not stages:
        axis.set_xmargin(0.05)
        return
    edges = stage_edges(stages)
    points = 72 * axis.get_window_extent().width / axis.figure.dpi
    total = max(edges[-1] - edges[0], 1e-9)
    axis.set_xlim(min(edges[0], axis.dataLim.x0) - 0.004 * total, max(edges[-1], axis.dataLim.x1) + 0.004 * total)
    for stage, (left, right) in zip(stages, pairwise(edges), strict=True):
        tint = tints[stage.block_size]
        axis.axvspan(left, right, color=tint, alpha=0.06, linewidth=0, zorder=0)
        if left > edges[0]:
            axis.axvline(left, color=tint, linewidth=1, alpha=0.5, zorder=0.5)
        if not label:
            continue
        names = (f"block {stage.block_size} · {stage.layout}", f"block {stage.block_size}", str(stage.block_size), "")
        room = points * (right - left) / total / fontsize  # in ems; a bold character is about 0.68 of one
        text = next(name for name in names if 0.68 * len(name) <= room)
        axis.annotate(
            text, ((left + right) / 2, 1.0), (0, 6), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", fontsize=fontsize, color=tint, fontweight="bold",
        )  # fmt: skip


def stage_edges(stages: Sequence[StageSpan]) -> list[float]:
    """Band edges: half-way between the last step of a stage and the first of the next. len(stages) + 1 values."""
    edges = [stages[0].first_step - 0.5]
    edges += [(left.last_step + right.first_step) / 2 for left, right in pairwise(stages)]
    return [*edges, stages[-1].last_step + 0.5]


def end_labels(axis: Axes, ends: Sequence[tuple[float, str, str]], fontsize: float = 11) -> None:
    """Name each curve at its end, pushed apart so that names do not overlap. ``ends``: (y, name, colour)."""
    low, high = axis.get_ylim()
    gap = 0.105 * (high - low)
    placed = float("-inf")
    for y, name, tint in sorted(ends):
        placed = max(y, placed + gap)
        axis.annotate(
            f"{name}\u2002{significant(y, 3)}", (1.0, placed), (8, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=fontsize, color=tint, fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip
