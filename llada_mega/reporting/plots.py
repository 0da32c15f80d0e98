"""The plots of a report. Each takes a run and returns a plot, or None when the run has nothing to show there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llada_mega.reporting.comparison import by_noise, noise_bounds, validation_as_evaluation
from llada_mega.reporting.formatting import finite, short_count, significant
from llada_mega.reporting.record import Row, RunRecord, StageSpan
from llada_mega.reporting.svg import Plot, colour, new_figure, plot_style, spread_colours, to_svg

WIDE, HALF, THIRD = 998, 468, 292  # CSS pixels inside a card: the page's column, its half, its third
MAX_POINTS = 1200  # a longer series is drawn as its mean and range in so many bins


def all_plots(record: RunRecord) -> list[Plot]:
    """Every plot the run has data for, in the order of the page."""
    makers: Sequence[Callable[[RunRecord], Plot | None]] = (
        training_loss, validation_loss, validation_accuracy, autoregressive_loss, loss_by_noise,
        gradient_norm, learning_rate, mask_ratio, throughput, utilisation, memory, expert_load, dead_experts,
    )  # fmt: skip
    with plot_style():
        return [plot for make in makers if (plot := make(record)) is not None]


def training_loss(record: RunRecord) -> Plot | None:
    """Weighted loss and cross entropy per masked token over the stages."""
    present = [key for key in ("ce_masked", "loss") if _series(record.training, key)[0].size]
    if not present:
        return None
    labels = {"ce_masked": "CE per masked token, nats", "loss": "weighted loss"}
    figure, axes = new_figure(WIDE, 60 + 200 * len(present), rows=len(present), sharex=True)
    for axis, key in zip(axes, present, strict=True):
        for stage in record.stages:
            _draw_series(axis, stage.rows, key, stage_colours(record)[stage.block_size])
        _mark_nonfinite(axis, record.training, key)
        _finish(axis, record, labels[key], label_stages=axis is axes[0])
    axes[-1].set_xlabel("step")
    caption = (
        "Faint: every logged step. Bold: running mean inside a stage. The weighted loss is what is optimised; "
        "the cross entropy per masked token compares across weightings."
    )
    return Plot("Training loss by stage", caption, to_svg(figure, "loss", "Training losses by step and stage"), "losses", "wide")


def stage_colours(record: RunRecord) -> dict[int, str]:
    """One colour a block size, over training and validation alike."""
    sizes = [stage.block_size for stage in record.stages]
    for row in record.validation:
        sizes += [int(size) for size in validation_as_evaluation(row)["block_sizes"]]
    return spread_colours(sizes)


def validation_loss(record: RunRecord) -> Plot | None:
    """Held-out cross entropy per block size."""
    return _validation_curves(
        record, "ce_masked", "Held-out denoising loss", "nats per masked token", "validation",
        "Cross entropy per masked token on held-out documents, one curve a block size.",
    )  # fmt: skip


def validation_accuracy(record: RunRecord) -> Plot | None:
    """Held-out accuracy per block size."""
    return _validation_curves(
        record, "accuracy", "Held-out accuracy", "% of masked tokens", "accuracy",
        "Share of masked tokens whose most probable candidate is right.",
    )  # fmt: skip


def _validation_curves(record: RunRecord, key: str, title: str, unit: str, name: str, caption: str) -> Plot | None:
    evaluations = [(row["step"], validation_as_evaluation(row)["block_sizes"]) for row in record.validation]
    colours = stage_colours(record)
    curves: list[tuple[int, list[float], list[float]]] = []
    for size in sorted({int(size) for _, blocks in evaluations for size in blocks}):
        points = [(step, finite(blocks.get(str(size), {}).get(key))) for step, blocks in evaluations]
        scale = 100 if key == "accuracy" else 1
        kept = [(float(step), scale * value) for step, value in points if value is not None]
        if kept:
            curves.append((size, [step for step, _ in kept], [value for _, value in kept]))
    if not curves:
        return None
    figure, (axis,) = new_figure(THIRD, 230)
    for size, steps, values in curves:
        axis.plot(steps, values, color=colours[size], marker="o", markersize=4.5)
    _finish(axis, record, unit, label_stages=False)
    axis.set_xlabel("step")
    _end_labels(axis, [(steps[-1], values[-1], f"block {size}", colours[size]) for size, steps, values in curves])
    return Plot(title, caption, to_svg(figure, name, f"{title} by step"), "losses", "third")


def autoregressive_loss(record: RunRecord) -> Plot | None:
    """Shifted next-token loss under the causal layout: what the conversion should keep."""
    return _simple(
        record, record.validation, "valid/ar_nll", "AR loss", "nats per token", "ar-loss",
        "Next-token loss of the same weights, read causally: what the conversion should keep.",
        marker=True, group="losses", width="third", at_least=0.5,
    )  # fmt: skip


def loss_by_noise(record: RunRecord) -> Plot | None:
    """Cross entropy over the noise level, first evaluation against last, a panel a block size."""
    last = record.eval_after or _last_with_noise(record, -1)
    first = record.eval_before or _last_with_noise(record, 0)
    panels = [
        (int(size), by_noise(first.get("block_sizes", {}).get(size, {}).get("by_noise")), levels)
        for size, values in sorted(last.get("block_sizes", {}).items(), key=lambda item: int(item[0]))
        if (levels := by_noise(values.get("by_noise")))
    ]
    if not panels:
        return None
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(WIDE, 60 + 200 * rows, rows=rows, columns=columns, sharey=True, sharex=True)
    colours = spread_colours([size for size, _, _ in panels] + list(stage_colours(record)))
    for axis, (size, before, after) in zip(axes, panels, strict=False):
        middles = [sum(noise_bounds(level)) / 2 for level in after]
        started = [before.get(level) for level in after]
        if first is not last and all(value is not None for value in started):
            old, new = np.asarray(started, float), np.asarray(list(after.values()))
            axis.fill_between(middles, old, new, color=colours[size], alpha=0.10, linewidth=0)
            axis.plot(middles, old, color=colour("muted"), linestyle=(0, (3, 3)), linewidth=1.5)
        axis.plot(middles, list(after.values()), color=colours[size], marker="o", markersize=4.5)
        axis.set_title(f"block {size}", loc="left", fontsize=12, color=colours[size], fontweight="bold", pad=10)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("nats per masked token")
    figure.supxlabel("mask level t", fontsize=12, color=colour("muted"))
    caption = (
        "Cross entropy by the share t of masked tokens: first evaluation (dashed) and last (solid). "
        "At high t the model has little but the finished blocks to go by."
    )
    return Plot("Loss by noise level", caption, to_svg(figure, "noise", "Held-out loss by noise level"), "losses", "wide")


def _last_with_noise(record: RunRecord, index: int) -> dict[str, Any]:
    evaluations = [validation_as_evaluation(row) for row in record.validation]
    kept = [entry for entry in evaluations if any("by_noise" in values for values in entry["block_sizes"].values())]
    return kept[index] if kept else {}


def gradient_norm(record: RunRecord) -> Plot | None:
    """Global gradient norm before clipping."""
    clip = finite(record.section("optimizer").get("clip_grad"))
    caption = "Norm over all parameters before clipping." + (f" Dashed: clipped above {clip:g}." if clip else "")
    return _simple(
        record, record.training, "grad_norm", "Gradient norm", "L2 norm", "grad-norm", caption, reference=clip, log=True
    )


def learning_rate(record: RunRecord) -> Plot | None:
    """Learning rate."""
    return _simple(
        record, record.training, "lr", "Learning rate", "", "lr",
        "As the curriculum sets it, a function of the consumed samples.", smooth=False, zero=True,
    )  # fmt: skip


def mask_ratio(record: RunRecord) -> Plot | None:
    """Share of supervised tokens that were masked."""
    return _simple(
        record, record.training, "mask_ratio", "Mask ratio", "share masked", "mask-ratio",
        "Share of tokens that were masked. Noise levels are drawn to cover their range evenly.", span=(0.0, 1.0),
    )  # fmt: skip


def throughput(record: RunRecord) -> Plot | None:
    """Data tokens and model positions a second."""
    keys = [key for key in ("tokens_per_s", "positions_per_s") if _series(record.training, key)[0].size]
    if not keys:
        return None
    names = {"tokens_per_s": "data tokens", "positions_per_s": "model positions"}
    tints = {"tokens_per_s": colour("accent"), "positions_per_s": colour("muted")}
    figure, (axis,) = new_figure(HALF, 250)
    for key in keys:
        for stage in record.stages:
            _draw_series(axis, stage.rows, key, tints[key])
    axis.set_ylim(bottom=0)
    _finish(axis, record, "per second", label_stages=False)
    axis.set_xlabel("step")
    ends = [(*_last_point(record.training, key), names[key], tints[key]) for key in keys]
    _end_labels(axis, ends)
    caption = "Data tokens a second, and the positions the model computes for them (noisy and clean)."
    return Plot("Throughput", caption, to_svg(figure, "throughput", "Throughput by step"), "machine")


def utilisation(record: RunRecord) -> Plot | None:
    """Model FLOPs utilisation, or TFLOP/s where the peak is not known."""
    if _series(record.training, "mfu")[0].size:
        return _simple(record, record.training, "mfu", "Model FLOPs utilisation", "share of peak", "mfu",
                       "Useful FLOPs over what the device could do at its peak.", zero=True)  # fmt: skip
    return _simple(record, record.training, "tflops_per_device", "TFLOP/s per device", "TFLOP/s", "tflops",
                   "Useful floating point work a second; attention counts the visible area only.", zero=True)  # fmt: skip


def memory(record: RunRecord) -> Plot | None:
    """Peak memory."""
    return _simple(record, record.training, "memory_gib", "Memory", "GiB", "memory",
                   "Peak memory of the process so far.", smooth=False, zero=True)  # fmt: skip


def expert_load(record: RunRecord) -> Plot | None:
    """Largest expert load over the mean."""
    return _simple(
        record, record.training, "expert_load_max_over_mean", "Expert load", "busiest expert over mean", "expert-load",
        "1 is perfect balance (dashed). Padding does not count.", reference=1.0,
    )  # fmt: skip


def dead_experts(record: RunRecord) -> Plot | None:
    """Experts that received no token."""
    return _simple(record, record.training, "dead_experts", "Dead experts", "experts", "dead-experts",
                   "Experts that received no token in a step.", smooth=False, zero=True)  # fmt: skip


def _simple(
    record: RunRecord,
    rows: Sequence[Row],
    key: str,
    title: str,
    unit: str,
    name: str,
    caption: str,
    *,
    smooth: bool = True,
    marker: bool = False,
    reference: float | None = None,
    log: bool = False,
    zero: bool = False,
    span: tuple[float, float] | None = None,
    group: str = "machine",
    width: str = "half",
    at_least: float | None = None,
) -> Plot | None:
    """One series over the steps.

    ``log``: a logarithmic axis where the values spread over more than a factor of 30. ``at_least``: the smallest range
    the axis shows, so that noise does not look like a trend.
    """
    steps, values = _series(rows, key)
    if not steps.size:
        return None
    figure, (axis,) = new_figure(*((THIRD, 230) if width == "third" else (HALF, 250)))
    if marker:
        axis.plot(steps, values, color=colour("accent"), marker="o", markersize=4.5)
    else:
        parts = [stage.rows for stage in record.stages] if smooth else [rows]
        for part in parts:  # a running mean across a change of stage would blur what the change did
            _draw_series(axis, part, key, colour("accent"), smooth=smooth)
    if reference is not None:
        axis.axhline(reference, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 4)), zorder=1)
    if log and values.min() > 0 and values.max() > 30 * values.min():
        axis.set_yscale("log")
        axis.grid(False, which="minor")
    elif span is not None:
        axis.set_ylim(*span)
    elif at_least is not None and np.ptp(values) < at_least:
        middle = (values.max() + values.min()) / 2
        axis.set_ylim(middle - at_least / 2, middle + at_least / 2)
    elif zero:
        axis.set_ylim(0, max(values.max() * 1.08, 1e-12))
    _mark_nonfinite(axis, rows, key)
    _finish(axis, record, unit, label_stages=False)
    axis.set_xlabel("step")
    return Plot(title, caption, to_svg(figure, name, f"{title} by step"), group, width)


def _series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) float64 of the rows where ``key`` is a finite number."""
    points = [(row["step"], value) for row in rows if (value := finite(row.get(key))) is not None]
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _last_point(rows: Sequence[Row], key: str) -> tuple[float, float]:
    steps, values = _series(rows, key)
    recent = values[-max(len(values) // 10, 1) :]
    return float(steps[-1]), float(recent.mean())


def _draw_series(axis: Axes, rows: Sequence[Row], key: str, tint: str, *, smooth: bool = True) -> None:
    """A faint line of every step and a bold running mean; for a long series its range and mean by bins."""
    steps, values = _series(rows, key)
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


def _mark_nonfinite(axis: Axes, rows: Sequence[Row], key: str) -> None:
    steps = [row["step"] for row in rows if key in row and row[key] is not None and finite(row[key]) is None]
    if steps:
        frame = axis.get_xaxis_transform()
        axis.plot(steps, [0.04] * len(steps), "x", color=colour("warn"), transform=frame, markersize=7, clip_on=False)


def _finish(axis: Axes, record: RunRecord, unit: str, *, label_stages: bool) -> None:
    """Stage bands behind, limits to the run's steps, tick formats, and the unit on top of the axis."""
    _stage_bands(axis, record, label=label_stages)
    if unit:
        pad = 28 if label_stages else 8
        axis.set_title(unit, loc="left", fontsize=11, color=colour("muted"), pad=pad)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if axis.get_yscale() == "linear":
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if max(abs(limit) for limit in axis.get_ylim()) >= 1e4:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        elif max(abs(limit) for limit in axis.get_ylim()) < 1e-2:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else f"{value:.1e}"))


def _stage_bands(axis: Axes, record: RunRecord, *, label: bool) -> None:
    """Shade each stage in its block size's colour; name it above the band where there is room."""
    if not record.stages:
        axis.set_xmargin(0.05)
        return
    colours = stage_colours(record)
    edges = stage_edges(record.stages)
    total = max(edges[-1] - edges[0], 1e-9)
    axis.set_xlim(min(edges[0], axis.dataLim.x0) - 0.004 * total, max(edges[-1], axis.dataLim.x1) + 0.004 * total)
    for stage, left, right in zip(record.stages, edges, edges[1:], strict=False):
        tint = colours[stage.block_size]
        axis.axvspan(left, right, color=tint, alpha=0.06, linewidth=0, zorder=0)
        if left > edges[0]:
            axis.axvline(left, color=tint, linewidth=1, alpha=0.5, zorder=0.5)
        if not label:
            continue
        share = (right - left) / total
        text = f"block {stage.block_size} · {stage.layout}" if share > 0.16 else f"block {stage.block_size}"
        if share < 0.075:
            text = str(stage.block_size) if share > 0.03 else ""
        axis.annotate(
            text, ((left + right) / 2, 1.0), (0, 6), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", fontsize=12, color=tint, fontweight="bold",
        )  # fmt: skip


def stage_edges(stages: Sequence[StageSpan]) -> list[float]:
    """Band edges: half-way between the last step of a stage and the first of the next. len(stages) + 1 values."""
    edges = [stages[0].first_step - 0.5]
    edges += [(left.last_step + right.first_step) / 2 for left, right in zip(stages, stages[1:], strict=False)]
    return [*edges, stages[-1].last_step + 0.5]


def _end_labels(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each curve at its end, pushed apart so that names do not overlap. ``ends``: (x, y, name, colour)."""
    low, high = axis.get_ylim()
    gap = 0.105 * (high - low)
    placed = float("-inf")
    for _, y, name, tint in sorted(ends, key=lambda end: end[1]):
        placed = max(y, placed + gap)
        axis.annotate(
            f"{name}\u2002{significant(y, 3)}", (1.0, placed), (8, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=11, color=tint, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
