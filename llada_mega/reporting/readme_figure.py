"""The README's picture, from a real run: ``python -m llada_mega.reporting.readme_figure RUN OUTPUT.png``.

Left the attention mask at up to three stages of the curriculum, in the middle the held-out losses over those stages,
right before and after; below, how a block of text was denoised, where the run has a sample.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from llada_mega.errors import DataError, LladaMegaError
from llada_mega.reporting.axes import (
    all_block_sizes,
    draw_series,
    end_labels,
    series,
    stage_bands,
    tick_formats,
    validation_curves,
)
from llada_mega.reporting.comparison import Comparison, compare_run
from llada_mega.reporting.formatting import nats
from llada_mega.reporting.mask_layout import draw_layout
from llada_mega.reporting.mask_options import MaskOptions
from llada_mega.reporting.mask_picture import COLOURS, INK, MUTED, draw_mask_axes
from llada_mega.reporting.page import display_width
from llada_mega.reporting.palette import SERIES_LIGHT, spread
from llada_mega.reporting.record import RunRecord, StageSpan, read_run
from llada_mega.reporting.sample import GeneratedSample, TracedBlock

GRID, FRESH = "#e2e3e6", "#3451c6"
STYLE: Any = {
    "font.size": 10, "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": GRID, "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED, "xtick.labelsize": 9, "ytick.labelsize": 9, "ytick.major.size": 0, "text.color": INK,
    "lines.linewidth": 2, "lines.solid_capstyle": "round",
}  # fmt: skip
LEGEND = {"noisy → noisy": "noisy: its own block", "noisy → clean": "noisy: earlier blocks, clean",
          "clean → clean": "clean: up to its own block"}  # fmt: skip
MAX_MASK_STAGES = 3
MAX_TRACE_ROWS = 6
WIDTH, MARGIN, COLUMN = 13.0, 0.3, 2.55  # inches: the figure, its border, the column of masks with the space after it
TOP, TOP_WITH_TRACE = 4.3, 3.6  # inches: height of curves and bars, without and with a trace below
TRACE_FONT = 10.5
CHARACTER = 0.602 * TRACE_FONT / 72  # inches: advance of DejaVu Sans Mono, which comes with matplotlib


def write_readme_figure(run_dir: Path, output: Path) -> Path:
    """Write the picture. Raises DataError when the run has no steps or ``output`` cannot be written."""
    record = read_run(run_dir)
    if not record.training:
        raise DataError(f"{run_dir}: no step logged yet, there is nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure = _figure(record)
        try:
            figure.savefig(output, dpi=200, facecolor="white")
        except (OSError, ValueError) as error:
            raise DataError(f"{output}: cannot write the picture ({error}); choose another place or format") from error
    return output


def _figure(record: RunRecord) -> Figure:
    blocks = _blocks_to_show(record.sample)
    rows = min(max((len(block.snapshots) for block in blocks), default=0), MAX_TRACE_ROWS)
    below = 0.62 + 0.3 * rows if rows else 0.0
    top = TOP_WITH_TRACE if rows else TOP
    height = 0.75 + top + 0.6 + below
    figure = Figure(figsize=(WIDTH, height))
    tints = {size: SERIES_LIGHT[index] for size, index in spread(all_block_sizes(record)).items()}
    base = height - 0.75 - top
    _masks(figure, record, bottom=0.2, top=height - 0.5)
    kind = "Held-out" if record.validation else "Training"
    _heading(figure, COLUMN + 0.05, height - 0.42, f"{kind} loss", "nats per masked token")
    _losses(_axes(figure, COLUMN + 0.35, base, 5.55, top), record, tints)
    table = compare_run(record)
    bars = [row for row in table.headline if row.after is not None] if table else []
    if bars:
        _heading(figure, 9.75, height - 0.42, "Before and after", "nats")
        _bars(_axes(figure, 10.45, base, 2.35, top), bars[::-1], tints)
    if rows and record.sample:
        title = "Denoised block by block, a few tokens a step"
        _heading(figure, COLUMN + 0.05, below - 0.2, title, f"prompt: “{_ending(record.sample.prompt)}”")
        _trace(_axes(figure, COLUMN + 0.05, 0.22, WIDTH - COLUMN - 0.2, 0.3 * rows), blocks, rows)
    return figure


def _ending(text: str, width: int = 48) -> str:
    """The last words of a text."""
    return text if len(text) <= width else "… " + text[-width:].split(" ", 1)[-1]


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _heading(figure: Figure, left: float, bottom: float, title: str, detail: str = "") -> None:
    across, up = figure.get_size_inches()
    text = figure.text(left / across, bottom / up, title, fontsize=12, fontweight="bold", color=INK, va="baseline")
    if detail:
        figure.draw_without_rendering()
        end = text.get_window_extent().x1 / figure.dpi
        figure.text(
            (end + 0.12) / across, bottom / up, detail, fontsize=10, color=MUTED, va="baseline", parse_math=False
        )


def stages_to_draw(stages: Sequence[StageSpan]) -> list[StageSpan]:
    """Up to three stages with different masks, in order: the first, the last, the largest block, else one between."""
    largest = max(range(len(stages)), key=lambda index: stages[index].block_size)
    kept: dict[tuple[int, str], int] = {}
    for index in (0, len(stages) - 1, largest, len(stages) // 2, *range(len(stages))):
        kept.setdefault((stages[index].block_size, stages[index].layout), index)
    return [stages[index] for index in sorted(list(kept.values())[:MAX_MASK_STAGES])]


def _masks(figure: Figure, record: RunRecord, *, bottom: float, top: float) -> None:
    """One small mask a stage, over a document of two of the largest blocks and one of a single block."""
    stages = stages_to_draw(record.stages)
    unit = max(stage.block_size for stage in stages)
    across, up = figure.get_size_inches()
    _heading(figure, MARGIN, top + 0.08, "Who sees whom")
    pitch = min((top - bottom - 0.66) / len(stages), 2.35)
    side = pitch - 0.4
    for number, stage in enumerate(stages):
        upper = top - number * pitch
        options = MaskOptions(documents=[2 * unit, unit], block_size=stage.block_size, layout=stage.layout or "bdlm")
        draw_mask_axes(_axes(figure, MARGIN, upper - 0.36 - side, side, side), draw_layout(options), small=True)
        label = f"block size {stage.block_size}"
        figure.text(MARGIN / across, (upper - 0.3) / up, label, color=INK, fontsize=10, va="baseline")
    y = top - len(stages) * pitch - 0.24
    for line, (region, text) in enumerate(LEGEND.items()):
        place = (y - 0.19 * line) / up
        figure.text(MARGIN / across, place, "■", color=COLOURS[region], fontsize=10, va="baseline")
        figure.text((MARGIN + 0.17) / across, place, text, color=MUTED, fontsize=8.5, va="baseline")


def _losses(axis: Axes, record: RunRecord, tints: dict[int, str]) -> None:
    """Held-out curves over a faint training loss; the training loss alone in a run without validation."""
    curves = validation_curves(record, "ce_masked")
    for stage in record.stages:
        steps, values = series(stage.rows, "ce_masked")
        if curves:
            axis.plot(steps, values, color=tints[stage.block_size], alpha=0.28, linewidth=1)
        else:
            draw_series(axis, stage.rows, "ce_masked", tints[stage.block_size])
    for size, (steps_logged, values_logged) in curves.items():
        axis.plot(steps_logged, values_logged, color=tints[size], marker="o", markersize=4)
    stage_bands(axis, record.stages, tints, label=True, fontsize=10)
    tick_formats(axis)
    axis.set_xlabel("step")
    end_labels(axis, [(values[-1], f"block {size}", tints[size]) for size, (_, values) in curves.items()], fontsize=9.5)


def _bars(axis: Axes, rows: Sequence[Comparison], tints: dict[int, str]) -> None:
    """Before (pale) and after (solid) of the losses that sum the run up, from the bottom upwards."""
    axis.set_axis_off()
    longest = max((value for row in rows for value in (row.before, row.after) if value is not None), default=1.0)
    for position, row in enumerate(rows):
        tint = MUTED if row.block_size is None else tints.get(row.block_size, MUTED)
        for value, offset, alpha, ink, weight in (
            (row.before, 0.18, 0.25, MUTED, "normal"),
            (row.after, -0.18, 1.0, tint, "bold"),
        ):
            if value is not None:
                axis.barh(position + offset, value, height=0.32, color=tint, alpha=alpha)
                axis.text(value + 0.03 * longest, position + offset, nats(value), color=ink, fontsize=9.5,
                          fontweight=weight, va="center")  # fmt: skip
        label = "AR loss" if row.block_size is None else f"block {row.block_size}"
        axis.text(-0.05 * longest, position, label, color=INK, fontsize=10, ha="right", va="center")
    axis.set_xlim(0, 1.25 * longest)
    axis.set_ylim(-0.5, max(len(rows), 3) - 0.5)


def _blocks_to_show(sample: GeneratedSample | None) -> list[TracedBlock]:
    """The blocks that were filled in over several steps; the one that holds the end of the prompt only when alone."""
    filled = [block for block in (sample.blocks if sample else ()) if len(block.snapshots) > 1]
    return [block for block in filled if block.given == 0] or filled


def _trace(axis: Axes, blocks: Sequence[TracedBlock], rows: int) -> None:
    """Blocks from left to right as far as there is room, a row a denoising step. Unit: a character and a row."""
    columns = axis.get_position().width * WIDTH / CHARACTER
    axis.set_axis_off()
    axis.set_xlim(0, columns)
    axis.set_ylim(rows, 0)
    left = 0.0
    for block in blocks:
        widths = [max(display_width(token or ""), 2) for token in block.tokens]
        needed = 8 + sum(width + 0.7 for width in widths)
        if left and left + needed > columns:
            break
        _trace_block(axis, block, widths, left, columns, rows)
        left += needed + 3.5


def _trace_block(axis: Axes, block: TracedBlock, widths: Sequence[int], left: float, right: float, rows: int) -> None:
    """Masked positions are empty boxes, tokens filled in since the row above are highlighted."""
    last = len(block.snapshots) - 1
    steps = min(rows, last + 1)
    shown = [round(row * last / max(steps - 1, 1)) for row in range(steps)]
    font: Any = {"family": "monospace", "fontsize": TRACE_FONT, "va": "center", "parse_math": False}
    before: Sequence[str | None] = block.snapshots[0][: block.given] + (None,) * (len(block.tokens) - block.given)
    for row, index in enumerate(shown):
        axis.text(left, row + 0.5, f"step {block.step_numbers()[index]}", color=MUTED, fontsize=9.5, va="center")
        column = left + 8
        cells = zip(block.snapshots[index], before, widths, strict=True)
        for position, (token, previous, width) in enumerate(cells):
            if column + width + 1 > right:
                axis.text(column + 0.3, row + 0.5, "…", color=MUTED, **font)
                break
            fresh = token is not None and token != previous
            if token is None or fresh:
                look: Any = (
                    {"facecolor": FRESH, "edgecolor": "none"} if fresh else {"facecolor": "#eff0f3", "edgecolor": GRID}
                )
                axis.add_patch(FancyBboxPatch((column + 0.1, row + 0.12), width + 0.3, 0.76, linewidth=0.8,
                                              boxstyle="round,pad=0,rounding_size=0.14", **look))  # fmt: skip
            if token is not None:
                text = token.replace("\n", "↵")
                axis.text(column + 0.25 + width / 2, row + 0.48, text.strip() or text, ha="center",
                          color="white" if fresh else (MUTED if position < block.given else INK), **font)  # fmt: skip
            column += width + 0.7
        before = block.snapshots[index]


def main(arguments: Sequence[str]) -> int:
    """Command line of this module: RUN OUTPUT."""
    if len(arguments) != 2:
        print("usage: python -m llada_mega.reporting.readme_figure RUN OUTPUT.png", file=sys.stderr)
        return 2
    try:
        print(write_readme_figure(Path(arguments[0]), Path(arguments[1])))
    except LladaMegaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
