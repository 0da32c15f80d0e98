"""Matplotlib figures as inline SVG that follow the page: its font, its light or dark colours.

Figures are drawn with stand-in colours; the exported SVG names CSS variables in their place (``var(--ink)``), which the
page defines for light and dark. Text stays text, so that it is set in the page's font and can be searched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from llada_mega.reporting.palette import SERIES_LIGHT

ROLES = ("ink", "muted", "grid", "accent", "warn", "paper")
PIXELS_PER_INCH = 72  # of an SVG's user units: a figure of 14.4 inches is 1040 pixels wide


def colour(role: str) -> str:
    """Stand-in for the CSS variable ``--<role>``."""
    return f"#0101{ROLES.index(role):02x}"


def series_colour(index: int) -> str:
    """Stand-in for the CSS variable ``--series-<index>``."""
    return f"#0102{index % len(SERIES_LIGHT):02x}"


@dataclass(frozen=True)
class Plot:
    """An inline SVG with its heading and an explanation of what is drawn."""

    title: str
    caption: str
    svg: str
    group: str  # losses | machine: the section of the page
    width: str = "half"  # wide | half | third: of the page's column


@contextmanager
def plot_style() -> Iterator[None]:
    """Matplotlib settings of every plot of the page; sizes are CSS pixels."""
    settings: Any = {
        "svg.fonttype": "none",
        "font.size": 12,
        "axes.edgecolor": colour("grid"),
        "axes.labelcolor": colour("muted"),
        "axes.labelsize": 12,
        "axes.linewidth": 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": colour("grid"),
        "grid.linewidth": 1,
        "text.color": colour("ink"),
        "xtick.color": colour("grid"),
        "ytick.color": colour("grid"),
        "xtick.labelcolor": colour("muted"),
        "ytick.labelcolor": colour("muted"),
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "ytick.major.size": 0,
        "lines.linewidth": 2,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 11,
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(
    width: int, height: int, rows: int = 1, columns: int = 1, *, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` CSS pixels and its axes, row by row."""
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), layout=ConstrainedLayoutEngine(wspace=0.04)
    )
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    flat = [axis for row in axes for axis in row]
    for axis in flat:
        axis.patch.set_alpha(0)
    return figure, flat


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as ``<svg>`` markup to put into HTML.

    ``name`` (unique on the page) prefixes ids; ``label`` is its text for readers who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would reach the whole page
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'="[^"]*"', _two_decimals, text)  # a hundredth of a pixel is enough; text content stays
    text = re.sub(r"#0101([0-9a-f]{2})", lambda match: f"var(--{ROLES[int(match[1], 16)]})", text)
    text = re.sub(r"#0102([0-9a-f]{2})", lambda match: f"var(--series-{int(match[1], 16)})", text)
    # The page's font. Matplotlib writes the shorthand (older versions) or one property each.
    text = re.sub(r"font-family: [^;\"]+;?\s*", "", text)
    text = text.replace("font-weight: 700", "font-weight: 600")
    text = re.sub(r"font: ((?:bold |[1-9]00 )?)([\d.]+px) [^;\"]+", _page_font, text)
    text = _scope_ids(text, name)
    text = re.sub(r"\n\s*", "\n", text)
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None
    view_box = re.search(r'viewBox="[^"]+"', head[0])
    assert view_box is not None
    opening = f'<svg {view_box[0]} role="img" aria-label="{escape(label, quote=True)}">'
    return opening + text[head.end() :].rstrip()


def _two_decimals(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def _page_font(match: re.Match[str]) -> str:
    """'font: bold 12px DejaVu Sans, ...' -> size and weight only, so that the page's family applies."""
    return f"font-size: {match[2]}" + ("; font-weight: 600" if match[1] else "")


def _scope_ids(text: str, name: str) -> str:
    """Drop ids that nothing refers to, prefix the others: several figures share one page."""
    referenced = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))

    def keep(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in referenced else ""

    text = re.sub(r'\sid="([^"]+)"', keep, text)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
