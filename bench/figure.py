"""The pictures of `make bench`: how the cost of a step grows, and where the time of the data pipeline goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.data_pipeline import PARTS, Rate
from bench.scaling import Point
from llada_mega.reporting.mask_picture import INK, MUTED
from llada_mega.reporting.palette import SERIES_LIGHT
from llada_mega.reporting.readme_figure import STYLE

LABELS = {
    "tokens": "tokens of the sequence, one document, block 32",
    "documents": "documents in 1024 tokens, block 32",
    "block size": "block size, one document of 1024 tokens",
    "experts": "experts, 4 chosen, 512 tokens, block 32",
}


def write_scaling(points: Sequence[Point], output: Path) -> None:
    """Tokens per CPU-second over each axis, both implementations and the floor."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 6.6), layout="constrained")
        for axis, (name, label) in zip(figure.subplots(2, 2).flat, LABELS.items(), strict=True):
            chosen = [point for point in points if point.axis == name]
            values = [point.value for point in chosen]
            for seconds, colour, style, what in (
                ([p.floor_seconds for p in chosen], MUTED, (0, (5, 3)), "matrix products over all 2L positions"),
                ([p.seconds for p in chosen], SERIES_LIGHT[0], "-", "llada-mega"),
                ([p.reference_seconds for p in chosen], SERIES_LIGHT[1], "-", "plain PyTorch"),
            ):
                rate = [p.tokens / s for p, s in zip(chosen, seconds, strict=True)]
                axis.plot(values, rate, "o", linestyle=style, color=colour, markersize=4, label=what)
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(value) for value in values])
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
            axis.set_ylabel("tokens per CPU-second")
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", frameon=False, ncols=3)
        figure.savefig(output, dpi=150, facecolor="white")


def write_data(rates: Sequence[Rate], output: Path) -> None:
    """A bar a corpus and block size: milliseconds of a sample, part by part."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 0.5 * len(rates) + 1.2), layout="constrained")
        axis: Axes = figure.subplots()
        left = np.zeros(len(rates))
        for part, colour in zip(PARTS, SERIES_LIGHT, strict=False):
            width = np.array([rate.milliseconds[part] for rate in rates])
            axis.barh(range(len(rates)), width, left=left, color=colour, label=part)
            left += width
        for row, (rate, end) in enumerate(zip(rates, left, strict=True)):
            axis.text(end, row, f"  {rate.tokens_per_cpu_second / 1e3:.0f}K tokens/s", va="center", color=INK)
        names = [f"{rate.documents_per_sample:.0f} documents, block {rate.block_size}" for rate in rates]
        axis.set_yticks(range(len(rates)), names)
        axis.invert_yaxis()
        axis.set_xlim(right=1.15 * float(left.max()))
        axis.set_xlabel("CPU milliseconds of a sample of 4096 tokens")
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(PARTS))
        figure.savefig(output, dpi=150, facecolor="white")
