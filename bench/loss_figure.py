"""The picture of :mod:`bench.loss_compare`: the curves now on top of those that are kept, and their distance."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.loss_runs import METRICS, STAGES, Curves
from llada_mega.reporting.mask_picture import INK, MUTED
from llada_mega.reporting.palette import SERIES_LIGHT
from llada_mega.reporting.readme_figure import STYLE

EQUAL = 1e-9  # where equal numbers are drawn, whose distance has no logarithm
KEPT = "#f0b429"
COLOURS = dict(zip(METRICS, (SERIES_LIGHT[0], INK, "#ce4a52"), strict=True))


def write_figure(drawn: dict[str, tuple[Curves, Curves]], tolerance: float, output: Path) -> None:
    """``drawn`` holds the new and the kept curves of each run, by its name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 5.6), layout="constrained")
        axes = figure.subplots(2, len(drawn), sharex=True, sharey="row", squeeze=False)
        for (above, below), (name, (curves, golden)) in zip(axes.T, drawn.items(), strict=True):
            _draw_losses(above, name, curves, golden)
            _draw_differences(below, curves, golden, tolerance)
        figure.savefig(output, dpi=150, facecolor="white")


def _draw_losses(axis: Axes, name: str, curves: Curves, golden: Curves) -> None:
    axis.set_title(f"{name}: cross entropy of masked tokens, nats", loc="left")
    steps = np.arange(1, len(golden["ce_masked"]) + 1)
    axis.plot(steps, golden["ce_masked"], color=KEPT, alpha=0.55, linewidth=6, label="kept")
    axis.plot(np.arange(1, len(curves["ce_masked"]) + 1), curves["ce_masked"], color=INK, linewidth=1.7, label="now")
    begun = 0
    for stage, _, count, _ in STAGES:
        axis.text(begun + (count + 1) / 2, 0.02, stage, color=MUTED, fontsize=9, ha="center",
                  transform=axis.get_xaxis_transform())  # fmt: skip
        begun += count
        axis.axvline(begun + 0.5, color=MUTED, linewidth=0.6, alpha=0.5)
    axis.legend(frameon=False)


def _draw_differences(axis: Axes, curves: Curves, golden: Curves, tolerance: float) -> None:
    axis.set_title("relative difference (dashed: tolerance)", loc="left")
    axis.set_yscale("log")
    for metric, colour in COLOURS.items():
        ours, kept = (np.asarray(series[metric]) for series in (curves, golden))
        steps = min(len(ours), len(kept))
        difference = np.abs(ours[:steps] - kept[:steps]) / np.abs(kept[:steps])
        axis.plot(np.arange(1, steps + 1), np.maximum(difference, EQUAL), "o", markersize=4, color=colour, label=metric)
    axis.axhline(tolerance, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axis.set_xlabel("step")
    axis.legend(frameon=False, ncols=len(METRICS))
