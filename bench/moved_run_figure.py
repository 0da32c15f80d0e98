"""The picture of :mod:`bench.moved_run`: both losses over the legs, and below how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from bench.moved_run import LEGS, LENGTH, STAGES
from llada_mega.reporting.mask_picture import INK, MUTED
from llada_mega.reporting.palette import SERIES_LIGHT
from llada_mega.reporting.readme_figure import STYLE

Row = dict[str, Any]
LOSS = "ce_masked"  # nats per masked token
TINTS = {"1 process": MUTED, "TP2 x PP2": SERIES_LIGHT[1], "CP2 x EP2": SERIES_LIGHT[5]}
EXPONENTS = (-10, -8, -6, -4)  # of the ticks
LIMIT, CONTROL = "#ce4a52", "#a9afb8"
EQUAL = 8e-12  # where equal bits are drawn, which have no logarithm
WIDTH, HEIGHT = 13.0, 5.6  # inches, as the other picture of the README


def write_figure(rows: dict[str, list[Row]], output: Path) -> None:
    """Draw the runs ``moved``, ``alone`` and ``control``."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        losses, differences = figure.subplots(
            2, 1, sharex=True, height_ratios=(1.2, 1),
            gridspec_kw={"hspace": 0.3, "left": 0.068, "right": 0.99, "top": 0.865, "bottom": 0.09},
        )  # fmt: skip
        _draw_losses(losses, rows)
        _draw_differences(differences, rows)
        for axis in (losses, differences):
            _draw_legs(axis)
        _name_legs(losses, [f"{leg.label}  ({leg.nproc} processes)" if leg.nproc > 1 else leg.label for leg in LEGS])
        _heading(losses, 34, "One training run, moved between layouts by checkpoint and resume",
                 "cross entropy, nats per masked token")  # fmt: skip
        _heading(
            differences, 9, "Distance from the run that was never moved", "relative difference of the cross entropy"
        )
        differences.set_xlabel("step")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=200, facecolor="white")


def relative_differences(rows: list[Row], reference: list[Row], key: str = LOSS) -> np.ndarray:
    """|a - b| / |b| of every step: float64 [steps]."""
    ours, theirs = (np.asarray([row[key] for row in series]) for series in (rows, reference))
    return np.abs(ours - theirs) / np.abs(theirs)


def _drawable(differences: np.ndarray) -> np.ndarray:
    return np.where(differences == 0.0, EQUAL, differences)


def edges() -> list[float]:
    """Half a step after the last step of every leg, from 0.5 on."""
    return [0.5, *(leg.last_step + 0.5 for leg in LEGS)]


def _draw_legs(axis: Axes) -> None:
    """A band a leg."""
    axis.set_xlim(edges()[0] - 0.3, edges()[-1] + 0.3)
    for leg, (left, right) in zip(LEGS, pairwise(edges()), strict=True):
        axis.axvspan(left, right, color=TINTS[leg.label], alpha=0.07, linewidth=0, zorder=0)
        if left > edges()[0]:
            axis.axvline(left, color=TINTS[leg.label], linewidth=1, alpha=0.5, zorder=0.5)


def _name_legs(axis: Axes, names: Sequence[str]) -> None:
    """Over each band its name."""
    for name, leg, (left, right) in zip(names, LEGS, pairwise(edges()), strict=True):
        axis.annotate(name, ((left + right) / 2, 1.0), (0, 6), xycoords=("data", "axes fraction"), ha="center",
                      textcoords="offset points", color=TINTS[leg.label], fontweight="bold")  # fmt: skip


def _draw_losses(axis: Axes, rows: dict[str, list[Row]]) -> None:
    """The unmoved run as a wide pale line, the moved one thin on top of it, in the colour of its layout."""
    steps = [row["step"] for row in rows["alone"]]
    axis.plot(steps, [row[LOSS] for row in rows["alone"]], color="#f0b429", alpha=0.55, linewidth=6,
              label="never moved, one process")  # fmt: skip
    moved = {row["step"]: row[LOSS] for row in rows["moved"]}
    first = 1
    for number, leg in enumerate(LEGS):
        shown = range(max(first - 1, 1), leg.last_step + 1)
        name = "moved" if number == 0 else None
        axis.plot(shown, [moved[step] for step in shown], color=INK if leg.nproc == 1 else TINTS[leg.label],
                  linewidth=1.7, label=name)  # fmt: skip
        first = leg.last_step + 1
    axis.set_ymargin(0.12)
    low, _ = axis.get_ylim()
    begun = 0
    for _, block_size, count, _ in STAGES:
        place = begun + (count + 1) / 2
        name = f"block {block_size}" if block_size < LENGTH else "no blocks"
        axis.text(place, low, name, color=MUTED, fontsize=9, ha="center", va="bottom")
        if begun:
            axis.plot([begun + 0.5] * 2, [0, 0.1], color=MUTED, linewidth=0.8, transform=axis.get_xaxis_transform())
        begun += count
    axis.legend(frameon=False, loc="upper right", fontsize=10, labelcolor=INK)


def _draw_differences(axis: Axes, rows: dict[str, list[Row]]) -> None:
    """A dot a step; equal bits, whose logarithm there is none of, on a line at the bottom."""
    axis.set_yscale("log")
    axis.set_ylim(EQUAL / 2.5, 5e-3)
    axis.yaxis.set_major_locator(FixedLocator([EQUAL, *(10.0**exponent for exponent in EXPONENTS)]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_yticklabels(["equal bits", *(f"$10^{{{exponent}}}$" for exponent in EXPONENTS)])
    axis.axhline(1e-5, color=LIMIT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    axis.annotate("$10^{-5}$", (0, 1e-5), (-4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                  color=LIMIT, fontsize=9, ha="right", va="center")  # fmt: skip
    control = relative_differences(rows["control"], rows["alone"])
    steps = np.arange(1, len(control) + 1)
    axis.plot(steps, _drawable(control), "o", markersize=5.5, markerfacecolor="none", markeredgecolor=CONTROL,
              label="not moved either: two samples a micro-batch")  # fmt: skip
    moved = relative_differences(rows["moved"], rows["alone"])
    for leg, (left, right) in zip(LEGS, pairwise(edges()), strict=True):
        mine = (steps > left) & (steps < right)
        axis.plot(steps[mine], _drawable(moved[mine]), "o", markersize=4.5,
                  color=INK if leg.nproc == 1 else TINTS[leg.label], label="moved" if left < 1 else None)  # fmt: skip
        largest = f"at most {moved[mine].max():.0e}" if moved[mine].max() else "equal bit for bit"
        axis.text((left + right) / 2, 1.2e-3, largest, color=TINTS[leg.label], ha="center", va="center")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.985), fontsize=10, labelcolor=INK, ncols=2,
                handletextpad=0.2, borderaxespad=0)  # fmt: skip


def _heading(axis: Axes, above: float, title: str, detail: str) -> None:
    """A bold title ``above`` points over the axes and a pale detail behind it."""
    text = axis.annotate(title, (0, 1), (0, above), xycoords="axes fraction", textcoords="offset points", fontsize=12,
                         fontweight="bold", color=INK, va="baseline")  # fmt: skip
    axis.annotate(detail, (1, 0), (9, 3), xycoords=text, textcoords="offset points", fontsize=10, color=MUTED,
                  va="baseline")  # fmt: skip
