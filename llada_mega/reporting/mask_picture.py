"""An attention mask as a picture (PNG, SVG or PDF)."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from llada_mega.errors import ConfigError
from llada_mega.reporting.mask_drawing import regions, size_line
from llada_mega.reporting.mask_layout import TILE, DrawnMask, count_tiles, quadrant, tile_coverage
from llada_mega.reporting.mask_options import MaskOptions

COLOURS = {"noisy → noisy": "#e07a3f", "noisy → clean": "#3b6fc9", "clean → clean": "#2f9e8f", "tokens": "#3b6fc9"}
INK, MUTED, LINE, EMPTY = "#1c2027", "#6a707a", "#c9cdd3", "#f6f7f8"
MAX_CELLS = 96  # up to so many rows each pair is a square of its own
MAX_TILES = 512  # above, tiles so large that no more than so many cover a side
MAX_BLOCK_LINES = 48
MAX_DOCUMENT_LINES = 192
MAX_DOCUMENT_LABELS = 8


def save_picture(options: MaskOptions, drawn: DrawnMask, path: Path) -> Path:
    """Write the picture. Raises ConfigError when the file cannot be written."""
    with matplotlib.rc_context({"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "mask"}):
        figure = Figure(figsize=(7.2, 8.6), facecolor="white")
        axis = figure.add_axes((0.13, 0.07, 0.84, 0.84 * 7.2 / 8.6))
        draw_mask_axes(axis, drawn)
        title = {"bdlm": "Block-diffusion mask", "mdlm": "Masked-diffusion mask", "ar": "Autoregressive mask"}
        figure.text(0.04, 0.975, title[options.layout], fontsize=16, fontweight="bold", color=INK, va="top")
        figure.text(0.04, 0.937, subtitle(options, drawn), fontsize=9, color=MUTED, va="top", linespacing=1.5)
        handles: list[Patch | Line2D] = [
            Patch(color=COLOURS[region], label="sees" if region == "tokens" else region) for region in regions(drawn)
        ]
        if len(drawn.segments) > len(drawn.halves):
            handles.append(Line2D([], [], color=INK, linewidth=1.0, label="document boundary"))
        figure.legend(
            handles=handles, loc="lower center", bbox_to_anchor=(0.55, 0.015), ncols=len(handles), frameon=False,
            labelcolor=INK, handlelength=1.1, handleheight=1.1, columnspacing=1.8,
        )  # fmt: skip
        try:
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"output={path}: cannot write ({error.strerror}); choose another place") from error
    return path


def subtitle(options: MaskOptions, drawn: DrawnMask) -> str:
    """Two lines: what is drawn, how much of it is live."""
    documents = ", ".join(f"{length:,}" for length in options.documents[:6])
    documents += ", …" if len(options.documents) > 6 else ""
    block = f"block size {options.block_size:,}  ·  " if options.layout == "bdlm" else ""
    live = f"live area {100 * drawn.live_share():.1f} %"
    if drawn.size > 2 * TILE:
        tiles = count_tiles(drawn.mask)
        live += f", {tiles.live:,} of {tiles.total:,} {TILE}-tiles"
    return f"{block}documents of {documents} tokens  ·  {live}\n{size_line(drawn)}"


def draw_mask_axes(axis: Axes, drawn: DrawnMask, *, small: bool = False) -> None:
    """Draw the mask into ``axis``: rows downwards, keys to the right, in units of positions.

    ``small``: a thumbnail, with thin lines, no blocks and no names.
    """
    size = drawn.size
    axis.set_xlim(0, size)
    axis.set_ylim(size, 0)
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_facecolor(EMPTY)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for row_half, first, last in drawn.halves:
        for key_half, start, stop in drawn.halves:
            region = drawn.region(row_half, key_half)
            if region is not None:
                _fill(axis, drawn, (first, last), (start, stop), COLOURS[region], gap=0.0 if small else 0.06)
    _boundaries(axis, drawn, small)
    if not small:
        _label_sides(axis, drawn)


def _fill(axis: Axes, drawn: DrawnMask, rows: tuple[int, int], keys: tuple[int, int], tint: str, gap: float) -> None:
    """Squares for a small mask; for a large one an image of tiles, as strong as they are full."""
    part = quadrant(drawn, rows, keys)
    if drawn.size <= MAX_CELLS:
        cells = [
            Rectangle((keys[0] + key + gap, rows[0] + row + gap), 1 - 2 * gap, 1 - 2 * gap)
            for row, key in np.argwhere(part.dense().numpy())
        ]
        axis.add_collection(PatchCollection(cells, facecolor=tint, edgecolor="none", zorder=2))
        return
    tile = max(-(-drawn.size // MAX_TILES), 1)
    share = tile_coverage(part, tile) / tile**2
    image = np.empty((*share.shape, 4))
    image[..., :3] = to_rgb(tint)
    image[..., 3] = np.where(share > 0, 0.4 + 0.6 * np.minimum(share, 1.0), 0.0)  # thin bands stay visible
    right, bottom = keys[0] + share.shape[1] * tile, rows[0] + share.shape[0] * tile
    extent = (keys[0], right, bottom, rows[0])
    shown = axis.imshow(image, extent=extent, interpolation="nearest", zorder=2, aspect="auto")
    quarter = Rectangle((keys[0], rows[0]), keys[1] - keys[0], rows[1] - rows[0], transform=axis.transData)
    shown.set_clip_path(quarter)  # the last tiles reach over the edge
    axis.set_aspect("equal")


def _boundaries(axis: Axes, drawn: DrawnMask, small: bool) -> None:
    """Faint lines at blocks, dark ones at documents, a white gap between the halves; none where nobody sees anybody."""
    halves = {start for _, start, _ in drawn.halves}
    documents = {segment.start for segment in drawn.segments} - halves
    lines: list[tuple[set[int], str, float]] = []
    if not small and len(drawn.block_edges) <= MAX_BLOCK_LINES:
        lines.append((set(drawn.block_edges[1:-1]) - halves, LINE, 0.5))
    if len(documents) <= MAX_DOCUMENT_LINES:
        lines.append((documents, INK, 0.5 if small else 0.8))
    for row_half, first, last in drawn.halves:
        for key_half, start, stop in drawn.halves:
            if drawn.region(row_half, key_half) is None:
                continue
            for edges, tint, width in lines:
                inside = [edge for edge in edges if start < edge < stop]
                axis.vlines(inside, first, last, color=tint, linewidth=width, zorder=1 if tint == LINE else 3)
                inside = [edge for edge in edges if first < edge < last]
                axis.hlines(inside, start, stop, color=tint, linewidth=width, zorder=1 if tint == LINE else 3)
    gap = 1.6 if small else 4
    for edge in halves - {0}:
        axis.plot([edge, edge], [0, drawn.size], color="white", linewidth=gap, zorder=4)
        axis.plot([0, drawn.size], [edge, edge], color="white", linewidth=gap, zorder=4)


def _label_sides(axis: Axes, drawn: DrawnMask) -> None:
    """Names of halves and documents along the top (keys) and the left side (rows), with brackets."""
    size = drawn.size
    names = {"noisy": "noisy  $x_t$", "clean": "clean  $x_0$", "tokens": "tokens"}
    many = len(drawn.segments) > MAX_DOCUMENT_LABELS * len(drawn.halves)
    far, near = 0.055 * size, 0.018 * size
    for name, start, stop in drawn.halves:
        if stop - start < 0.06 * size:
            continue
        pad = 0.006 * size
        axis.plot([start + pad, stop - pad], [-far, -far], color=INK, linewidth=1.2, clip_on=False)
        axis.plot([-far, -far], [start + pad, stop - pad], color=INK, linewidth=1.2, clip_on=False)
        middle, text = (start + stop) / 2, names[name]
        axis.text(middle, -far - near, text, ha="center", va="bottom", color=INK, fontsize=11)
        axis.text(-far - near, middle, text, ha="right", va="center", color=INK, fontsize=11, rotation=90)
    for segment in drawn.segments:
        if many or segment.stop - segment.start < 0.09 * size:
            continue
        middle, text = (segment.start + segment.stop) / 2, f"document {segment.document}"
        if segment.stop - segment.start < 0.16 * size:
            text = f"doc {segment.document}"
        axis.text(middle, -near, text, ha="center", va="bottom", color=MUTED, fontsize=8.5)
        axis.text(-near, middle, text, ha="right", va="center", color=MUTED, fontsize=8.5, rotation=90)
