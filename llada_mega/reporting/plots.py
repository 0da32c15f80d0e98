"""The plots of a report. Each takes a run and returns a plot, or None when the run has nothing to show there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llada_mega.reporting.axes import (
    all_block_sizes,
    draw_series,
    end_labels,
    mark_nonfinite,
    recent_mean,
    series,
    stage_bands,
    tick_formats,
    validation_curves,
)
from llada_mega.reporting.comparison import by_noise, noise_bounds, validation_as_evaluation
from llada_mega.reporting.formatting import finite
from llada_mega.reporting.palette import spread
from llada_mega.reporting.record import Row, RunRecord
from llada_mega.reporting.svg import Plot, colour, new_figure, plot_style, series_colour, to_svg
from llada_mega.reporting.time_plots import time_by_step

WIDE, HALF, THIRD = 998, 468, 292  # CSS pixels inside a card: the page's column, its half, its third


def all_plots(record: RunRecord) -> list[Plot]:
    """Every plot the run has data for, in the order of the page."""
    makers: Sequence[Callable[[RunRecord], Plot | None]] = (
        training_loss, validation_loss, validation_accuracy, autoregressive_loss, loss_by_noise,
        time_by_step, gradient_norm, learning_rate, mask_ratio, mask_embedding, throughput, utilisation, memory,
        expert_load, dead_experts,
    )  # fmt: skip
    with plot_style():
        return [plot for make in makers if (plot := make(record)) is not None]


def training_loss(record: RunRecord) -> Plot | None:
    """Weighted loss and cross entropy per masked token over the stages."""
    present = [key for key in ("ce_masked", "loss") if series(record.training, key)[0].size]
    if not present:
        return None
    labels = {"ce_masked": "CE per masked token, nats", "loss": "weighted loss"}
    figure, axes = new_figure(WIDE, 60 + 200 * len(present), rows=len(present), sharex=True)
    for axis, key in zip(axes, present, strict=True):
        for stage in record.stages:
            draw_series(axis, stage.rows, key, stage_colours(record)[stage.block_size])
        mark_nonfinite(axis, record.training, key, colour("warn"))
        _finish(axis, record, labels[key], label_stages=axis is axes[0])
    axes[-1].set_xlabel("step")
    caption = (
        "Faint: every logged step. Bold: running mean inside a stage. The weighted loss is what is optimised; "
        "the cross entropy per masked token compares across weightings."
    )
    svg = to_svg(figure, "loss", "Training losses by step and stage")
    return Plot("Training loss by stage", caption, svg, "losses", "wide")


def stage_colours(record: RunRecord) -> dict[int, str]:
    """One colour a block size, over training and validation alike."""
    return {size: series_colour(index) for size, index in spread(all_block_sizes(record)).items()}


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
    colours = stage_colours(record)
    scale = 100 if key == "accuracy" else 1
    curves = {
        size: (steps, [scale * value for value in values])
        for size, (steps, values) in validation_curves(record, key).items()
    }
    if not curves:
        return None
    figure, (axis,) = new_figure(THIRD, 230)
    for size, (steps, values) in curves.items():
        axis.plot(steps, values, color=colours[size], marker="o", markersize=4.5)
    _finish(axis, record, unit, label_stages=False)
    axis.set_xlabel("step")
    end_labels(axis, [(values[-1], f"block {size}", colours[size]) for size, (_, values) in curves.items()])
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
    first, last = record.eval_before or _noise_evaluation(record, 0), record.eval_after or _noise_evaluation(record, -1)
    caption = (
        "Cross entropy by the share t of masked tokens: first evaluation (dashed) and last (solid). "
        "At high t the model has little but the finished blocks to go by."
    )
    if not last:
        first, last = {}, _training_by_noise(record)
        caption = (
            "Cross entropy of the training steps by the share t of masked tokens, mean of each stage's second half."
        )
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
    sizes = spread([size for size, _, _ in panels] + all_block_sizes(record))
    colours = {size: series_colour(index) for size, index in sizes.items()}
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
    svg = to_svg(figure, "noise", "Held-out loss by noise level")
    return Plot("Loss by noise level", caption, svg, "losses", "wide")


def _noise_evaluation(record: RunRecord, index: int) -> dict[str, Any]:
    """The first (0) or last (-1) validation with losses by noise level, as an evaluation; empty when there is none."""
    evaluations = [validation_as_evaluation(row) for row in record.validation]
    kept = [entry for entry in evaluations if any("by_noise" in values for values in entry["block_sizes"].values())]
    return kept[index] if kept else {}


def _training_by_noise(record: RunRecord) -> dict[str, Any]:
    """Losses by noise level that the training steps logged (``ce_by_noise``), in the shape of an evaluation."""
    blocks: dict[str, Any] = {}
    for stage in record.stages:
        values: dict[str, list[float]] = {}
        for row in stage.rows[len(stage.rows) // 2 :]:
            for level, value in by_noise(row.get("ce_by_noise")).items():
                values.setdefault(level, []).append(value)
        if values:
            means = {level: sum(found) / len(found) for level, found in values.items()}
            blocks[str(stage.block_size)] = {"by_noise": means}
    return {"block_sizes": blocks}


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


def mask_embedding(record: RunRecord) -> Plot | None:
    """RMS of the MASK row of the embedding table, and the noise that is added to it."""
    return _several(
        record, {"mask_embedding_rms": ("MASK row", "accent"), "embedding_noise_std": ("noise", "muted")},
        "MASK embedding", "RMS", "mask-embedding",
        "An AR model never learned this row; noise on it keeps the first steps finite until it has grown.",
    )  # fmt: skip


def throughput(record: RunRecord) -> Plot | None:
    """Data tokens and model positions a second."""
    return _several(
        record, {"tokens_per_s": ("data tokens", "accent"), "positions_per_s": ("model positions", "muted")},
        "Throughput", "per second", "throughput",
        "Data tokens a second, and the positions the model computes for them (noisy and clean).",
    )  # fmt: skip


def _several(
    record: RunRecord, curves: Mapping[str, tuple[str, str]], title: str, unit: str, name: str, caption: str
) -> Plot | None:
    """Several series over the steps, ``curves``: key -> (name, role of the colour)."""
    keys = [key for key in curves if series(record.training, key)[0].size]
    if not keys:
        return None
    figure, (axis,) = new_figure(HALF, 250)
    for key in keys:
        for stage in record.stages:
            draw_series(axis, stage.rows, key, colour(curves[key][1]))
    axis.set_ylim(bottom=0)
    _finish(axis, record, unit, label_stages=False)
    axis.set_xlabel("step")
    end_labels(axis, [(recent_mean(record.training, key), curves[key][0], colour(curves[key][1])) for key in keys])
    return Plot(title, caption, to_svg(figure, name, f"{title} by step"), "machine")


def utilisation(record: RunRecord) -> Plot | None:
    """Model FLOPs utilisation, or TFLOP/s where the peak is not known."""
    if series(record.training, "mfu")[0].size:
        return _simple(record, record.training, "mfu", "Model FLOPs utilisation", "share of peak", "mfu",
                       "Useful FLOPs over what the device could do at its peak.", zero=True)  # fmt: skip
    return _simple(record, record.training, "tflops_per_device", "TFLOP/s per device", "TFLOP/s", "tflops",
                   "Useful floating point work a second; of attention the visible area only.", zero=True)  # fmt: skip


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
    steps, values = series(rows, key)
    if not steps.size:
        return None
    figure, (axis,) = new_figure(*((THIRD, 230) if width == "third" else (HALF, 250)))
    if marker:
        axis.plot(steps, values, color=colour("accent"), marker="o", markersize=4.5)
    else:
        parts = [stage.rows for stage in record.stages] if smooth else [rows]
        for part in parts:  # a running mean across a change of stage would blur what the change did
            draw_series(axis, part, key, colour("accent"), smooth=smooth)
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
    mark_nonfinite(axis, rows, key, colour("warn"))
    _finish(axis, record, unit, label_stages=False)
    axis.set_xlabel("step")
    return Plot(title, caption, to_svg(figure, name, f"{title} by step"), group, width)


def _finish(axis: Axes, record: RunRecord, unit: str, *, label_stages: bool) -> None:
    """Stage bands behind, limits to the run's steps, tick formats, and the unit on top of the axis."""
    stage_bands(axis, record.stages, stage_colours(record), label=label_stages)
    if unit:
        axis.set_title(unit, loc="left", fontsize=11, color=colour("muted"), pad=28 if label_stages else 8)
    tick_formats(axis)
