"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llada_mega.config.run import ParallelConfig
from llada_mega.planning.host import CHECKPOINT, HOST_COMPONENTS
from llada_mega.planning.memory import COMPONENTS
from llada_mega.planning.results import Plan, RankPlan, StagePlan
from llada_mega.planning.search import Search

MOST_COLUMNS = 6


def render(plan: Plan) -> Group:
    """Memory of every pipeline stage, time and communication of every curriculum stage, assumptions, the verdict."""
    return Group(
        _heading(plan),
        _memory(plan.ranks, plan.usable_gib),
        _host(plan),
        _curriculum(plan.stages),
        _step(plan.stages),
        _assumptions(plan),
        _verdict(plan),
    )


def render_search(search: Search, gpus: int) -> Group:
    """The layouts that a search found, fastest first."""
    table = _table(
        f"Fastest layouts on {gpus} devices",
        ["layout", "samples", "recompute", "GiB", "days", "GPU-h", "MFU"],
    )
    for plan in search.best:
        table.add_row(
            layout_name(plan.parallel, plan.data_parallel),
            str(plan.micro_batch_size),
            plan.parallel["recompute"],
            f"{plan.peak_gib:.1f}",
            f"{plan.days:.2f}",
            f"{plan.gpu_hours:,.0f}",
            f"{plan.mean_mfu:.0%}",
        )
    counts = f"{search.fitting} layouts fit, {search.too_large} do not."
    return Group(table, Text(counts if search.best else f"No layout fits. {counts}"))


def layout_name(parallel: dict[str, Any], data_parallel: int) -> str:
    """``tp=4 pp=4 vp=2 ep=8 dp=16``: what differs from one process."""
    defaults = vars(ParallelConfig())
    keys = [key for key in ("tp", "pp", "vp", "cp", "ep", "etp") if parallel[key] != defaults[key]]
    return " ".join([*(f"{key}={parallel[key]}" for key in keys), f"dp={data_parallel}"])


def _heading(plan: Plan) -> Text:
    layout = layout_name(plan.parallel, plan.data_parallel)
    return Text(
        f"{plan.run}: {plan.model['parameters'] / 1e9:.2f} B parameters, {plan.model['active'] / 1e9:.2f} B active, on "
        f"{plan.gpus} x {plan.hardware['name']}: {layout}, {plan.micro_batches} micro-batches of "
        f"{plan.micro_batch_size} a step and rank, {plan.dtype}, layers {plan.implementation}",
        style="bold",
    )


def _memory(ranks: Sequence[RankPlan], usable: float) -> Table:
    """One column a pipeline stage."""
    ranks = _chosen(ranks)
    table = _table("Peak memory of a rank, GiB", ["pipeline stage", *(str(rank.pipeline_stage) for rank in ranks)])
    table.add_row("layers", *(str(rank.layers) for rank in ranks))
    table.add_row("parameters, millions", *(f"{rank.parameters / 1e6:,.1f}" for rank in ranks))
    for component in COMPONENTS:
        row = [rank.memory_gib.get(component, 0.0) for rank in ranks]
        if any(row):
            table.add_row(component, *(_gib(value) for value in row))
    table.add_row(f"total (usable {usable:.1f})", *(_gib(rank.total_gib) for rank in ranks), style="bold")
    table.add_row("fits", *(_mark(rank.fits) for rank in ranks))
    table.add_row("largest at", *(f"{rank.moment}, {rank.curriculum_stage}" for rank in ranks), style="dim")
    return table


def _chosen(ranks: Sequence[RankPlan]) -> Sequence[RankPlan]:
    """All of few pipeline stages; of many the ends, the middle and the fullest."""
    if len(ranks) <= MOST_COLUMNS:
        return ranks
    fullest = max(ranks, key=lambda rank: rank.total_gib)
    return [rank for rank in ranks if rank in (*ranks[:2], fullest, ranks[len(ranks) // 2], *ranks[-2:])]


def _host(plan: Plan) -> Table:
    """The copy for checkpoints stays where saving is asynchronous; else it is there while a checkpoint is written."""
    ranks = _chosen(plan.ranks)
    table = _table(
        "Host memory of the rank that copies most, GiB",
        ["pipeline stage", *(str(rank.pipeline_stage) for rank in ranks)],
    )
    names = {CHECKPOINT: "copy for checkpoints" + (", kept" if plan.async_save else ", while saving")}
    for component in HOST_COMPONENTS:
        row = [rank.host_gib.get(component, 0.0) for rank in ranks]
        if any(row):
            table.add_row(names.get(component, component), *(_gib(value) for value in row))
    table.add_row("total", *(_gib(sum(rank.host_gib.values())) for rank in ranks), style="bold")
    table.add_row("the stage's ranks on its host", *(_gib(rank.shared_host_gib) for rank in ranks), style="bold")
    return table


def _gib(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.4f}" if value else "-"


def _mark(good: bool) -> Text:
    return Text("✓", style="green") if good else Text("✗", style="red")


def _curriculum(stages: Sequence[StagePlan]) -> Table:
    columns = ["stage", "layout", "positions", "steps", "s/step", "MFU", "B tok/day", "days", "GPU-h"]
    table = _table("Curriculum", columns)
    for stage in stages:
        table.add_row(
            stage.name,
            stage.layout,
            f"{stage.positions:,}",
            f"{stage.steps:,}",
            f"{stage.step_seconds:.3g}",
            f"{stage.mfu:.0%}",
            f"{stage.tokens_per_day / 1e9:.3g}",
            f"{stage.days:.2f}",
            f"{stage.gpu_hours:,.0f}",
        )
    return table


def _step(stages: Sequence[StagePlan]) -> Table:
    """One column for each kind of step: stages of as many positions share one; of many kinds, evenly chosen ones."""
    kinds = {stage.positions: stage for stage in reversed(stages)}
    ordered = [kinds[positions] for positions in sorted(kinds)]
    gap = -(-len(ordered) // MOST_COLUMNS)
    shown = [*ordered[:-1:gap], ordered[-1]]
    table = _table(
        "A step: model FLOPs of all devices, what the slowest rank sends and is busy with",
        ["", *(stage.name for stage in shown)],
    )
    table.add_row("model PFLOP", *(f"{stage.tflop / 1e3:.4g}" for stage in shown))
    table.add_row("logit rows", *(f"{stage.logit_rows:,}" for stage in shown))
    for axis in ("tp", "cp", "ep", "pp", "dp"):
        if any(axis in stage.sent_gib for stage in shown):
            table.add_row(f"{axis} sends, GiB", *(f"{stage.sent_gib.get(axis, 0.0):.4g}" for stage in shown))
    for term in shown[0].seconds:
        if any(stage.seconds[term] > 1e-3 * stage.step_seconds for stage in shown):
            table.add_row(f"{term}, s", *(f"{stage.seconds[term]:.3g}" for stage in shown))
    return table


def _assumptions(plan: Plan) -> Table:
    table = _table("Assumed, not measured; change with assume.KEY=VALUE and hardware.KEY=VALUE", ["key", "value"])
    for key, value in plan.assume.items():
        table.add_row(f"assume.{key}", "null" if value is None else str(value))
    for key in ("memory_gib", "memory_gb_per_s", "link_gb_per_s", "network_gb_per_s", "node_size", "host_size"):
        table.add_row(f"hardware.{key}", f"{plan.hardware[key]:g}")
    table.add_row("hardware.peak_tflops", f"{plan.hardware['peak_tflops'][plan.dtype]:g}")
    return table


def _verdict(plan: Plan) -> Text:
    time = f"{plan.days:.1f} days, {plan.gpu_hours:,.0f} GPU-hours, {plan.mean_mfu:.0%} MFU over the whole curriculum"
    if plan.fits:
        used = f"{plan.peak_gib:.1f} of {plan.usable_gib:.1f} GiB on the fullest rank"
        return Text(f"Fits: {used}. {time}.", style="green")
    return Text(
        f"Does not fit: {plan.peak_gib:.1f} GiB on the fullest rank, {plan.usable_gib:.1f} usable; more devices with "
        "parallel.distributed_optimizer=true, parallel.recompute=full, or larger parallel.tp, pp, ep make it smaller.",
        style="red",
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, header_style="dim", pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=not index)
    return table
