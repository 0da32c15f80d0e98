"""Tables for the terminal: an evaluation, and two evaluations side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import ROUNDED, Box
from rich.table import Table
from rich.text import Text

from llada_mega.reporting.comparison import Comparison, block_sizes, by_noise, compare_evaluations, noise_bounds
from llada_mega.reporting.formatting import MISSING, finite, nats, percent, signed

BOX: Box = ROUNDED
_VERDICT_STYLES = {"better": "bold green", "worse": "bold red", "same": "dim", "unknown": "dim"}
_VERDICT_SIGNS = {"better": "▲", "worse": "▼", "same": "=", "unknown": " "}  # so that colour is not needed
_BAR_WIDTH = 18


def render_before_after(
    before: Mapping[str, Any], after: Mapping[str, Any], *, title: str = "Before and after"
) -> Table:
    """Two evaluation JSONs as one table: losses in nats and accuracies per block size, then the AR loss.

    Values that are missing on one side are an en dash. ▲ marks what got better, ▼ what got worse, = what was kept.
    """
    rows = compare_evaluations(before, after)
    table = Table(title=title, title_justify="left", title_style="bold", box=BOX, header_style="dim")
    table.add_column("held-out measure", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("█ after  ─ before", no_wrap=True)
    losses = [value for row in rows if row.kind != "accuracy" for value in (row.before, row.after) if value]
    longest = max(losses, default=1.0)
    for row, following in zip(rows, [*rows[1:], None], strict=False):
        table.add_row(
            _label(row),
            _value(row, row.before),
            Text(_value(row, row.after), style="bold"),
            _change(row),
            _bar(row, 1.0 if row.kind == "accuracy" else longest),
            end_section=following is not None and following.block_size != row.block_size,
        )
    return table


def render_eval(result: Mapping[str, Any], *, title: str = "Held-out evaluation") -> Table:
    """One evaluation JSON, a column a block size: totals, cross entropy by noise level, and the AR loss."""
    table = Table(title=title, title_justify="left", title_style="bold", box=BOX, header_style="dim")
    table.add_column("nats a token", no_wrap=True)
    blocks = {size: result["block_sizes"][str(size)] for size in block_sizes(result)}
    for size in blocks:
        table.add_column(f"block {size}", justify="right", no_wrap=True)
    noise = {size: by_noise(values.get("by_noise")) for size, values in blocks.items()}
    levels = sorted({level for values in noise.values() for level in values}, key=noise_bounds)
    ar_nll = finite(result.get("ar_nll"))
    if blocks:
        for name, key, form, style in (
            ("masked CE", "ce_masked", nats, "bold"),
            ("NLL bound", "nll_bound", nats, ""),
            ("accuracy", "accuracy", percent, ""),
        ):
            cells = [form(finite(values.get(key))) for values in blocks.values()]
            table.add_row(name, *cells, style=style, end_section=key == "accuracy")
    for level in levels:
        cells = [nats(noise[size].get(level)) for size in blocks]
        table.add_row(f"masked CE at t {level}", *cells, style="dim", end_section=level == levels[-1])
    if ar_nll is not None:
        if not blocks:
            table.add_column("", justify="right")
        table.add_row("AR loss (causal)", nats(ar_nll))
    return table


def _label(row: Comparison) -> Text:
    name = "causal" if row.block_size is None else f"block {row.block_size}"
    return Text.assemble((f"{name:<10}", "bold" if row.label in ("Masked CE", "AR loss") else "dim"), row.label)


def _value(row: Comparison, value: float | None) -> str:
    return percent(value) if row.kind == "accuracy" else nats(value)


def _change(row: Comparison) -> Text:
    if row.change is None:
        return Text(MISSING, style="dim")
    number = f"{signed(100 * row.change, 1)} pt" if row.kind == "accuracy" else signed(row.change)
    return Text(f"{number} {_VERDICT_SIGNS[row.verdict]}", style=_VERDICT_STYLES[row.verdict])


def _bar(row: Comparison, scale: float) -> Text:
    """The value after as a solid bar, what it was before as a thin line."""

    def cells(value: float | None) -> int:
        return 0 if value is None else max(min(round(_BAR_WIDTH * value / scale), _BAR_WIDTH), 0)

    after, before = cells(row.after), cells(row.before)
    style = {"better": "green", "worse": "red"}.get(row.verdict, "blue")
    return Text.assemble(("█" * after, style), ("─" * max(before - after, 0), "dim"))
