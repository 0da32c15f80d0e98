"""What the report's template fills in: plain values, formatted, one function a section."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llada_mega.reporting.axes import all_block_sizes
from llada_mega.reporting.comparison import Comparison, ComparisonTable
from llada_mega.reporting.formatting import MISSING, count, finite, nats, percent, short_count, signed, significant
from llada_mega.reporting.palette import spread
from llada_mega.reporting.record import Row, RunRecord
from llada_mega.reporting.sample import GeneratedSample, TracedBlock

MAX_CARDS = 4
SAID_BEFORE = ("tokens_per_forward",)  # of a sample's facts
SHOWN_STEPS = 14  # denoising steps shown before the other blocks are folded away


@dataclass(frozen=True)
class Card:
    """A headline number; ``change`` and ``was`` are empty when there is nothing to compare with."""

    title: str
    now: str
    was: str
    change: str
    verdict: str
    note: str


def headline_cards(record: RunRecord, table: ComparisonTable | None) -> list[Card]:
    """Up to four numbers that sum the run up: the before/after losses, else the last training loss."""
    cards: list[Card] = []
    for row in table.headline if table else []:
        if row.after is None:
            continue
        title = "AR loss kept" if row.kind == "kept" and row.verdict == "same" else row.label
        if row.block_size is not None:
            title = f"Held-out CE, block {row.block_size}"
        change = signed(row.change) if row.change is not None else ""
        note = table.after_name if table else ""
        cards.append(Card(title, nats(row.after), nats(row.before), change, row.verdict, note))
    if cards:
        return cards if len(cards) <= MAX_CARDS else [*cards[: MAX_CARDS - 1], cards[-1]]
    final = mean_of(record.training[-max(len(record.training) // 10, 1) :], "ce_masked")
    if final is None:
        return []
    return [Card("Training CE per masked token", nats(final), "", "", "unknown", "mean of the last logged steps")]


def mean_of(rows: Sequence[Row], key: str) -> float | None:
    """Mean of the finite values of ``key``, None when there is none."""
    values = [value for row in rows if (value := finite(row.get(key))) is not None]
    return sum(values) / len(values) if values else None


def comparison_view(record: RunRecord, table: ComparisonTable | None) -> dict[str, Any] | None:
    """Title, column names and rows, grouped by block size, of the before/after table."""
    if table is None:
        return None
    single = not table.before_name
    measured = table.before_name == "before"
    title = "Held-out evaluation" if single else ("Before and after" if measured else "First and last validation")
    lead = "Losses in nats; the masked positions are drawn over the whole range of noise, t in (0, 1]."
    if not single:
        lead += " Pale bar or line: before. Solid bar: after."
    tints = series_variables(record)
    groups: list[dict[str, Any]] = []
    losses = [value for row in table.rows if row.kind != "accuracy" for value in (row.before, row.after) if value]
    longest = max(losses, default=1.0)
    for row in table.rows:
        name = "causal" if row.block_size is None else f"block {row.block_size}"
        if not groups or groups[-1]["name"] != name:
            groups.append({"name": name, "tint": tints.get(row.block_size or 0, "--accent"), "rows": []})
        groups[-1]["rows"].append(_comparison_row(row, 1.0 if row.kind == "accuracy" else longest))
    return {
        "title": title, "lead": lead, "before_name": table.before_name, "after_name": table.after_name, "groups": groups
    }  # fmt: skip


def _comparison_row(row: Comparison, scale: float) -> dict[str, Any]:
    form = percent if row.kind == "accuracy" else nats
    change = signed(row.change)
    if row.kind == "accuracy" and row.change is not None:
        change = f"{signed(100 * row.change, 1)} pt"

    def share(value: float | None) -> float | None:
        return None if value is None else round(100 * max(value, 0.0) / scale, 1)

    over = row.before is not None and row.after is not None and row.after >= row.before
    return {
        "label": row.label, "before": form(row.before), "after": form(row.after), "change": change,
        "verdict": row.verdict, "before_share": share(row.before), "after_share": share(row.after), "over": over,
    }  # fmt: skip


def series_variables(record: RunRecord) -> dict[int, str]:
    """Block size -> CSS variable of its colour, the same as in the plots."""
    return {size: f"--series-{index}" for size, index in spread(all_block_sizes(record)).items()}


def stage_rows(record: RunRecord) -> list[dict[str, str]]:
    """The table of stages; losses are means over the first and last tenth of a stage."""
    tints = series_variables(record)
    rows: list[dict[str, str]] = []
    consumed = 0.0
    for number, stage in enumerate(record.stages, start=1):
        tokens = finite(stage.rows[-1].get("consumed_tokens"))
        edge = max(len(stage.rows) // 10, 1)
        rates = [value for row in stage.rows if (value := finite(row.get("lr"))) is not None]
        span = (
            f" {MISSING} ".join(f"{value:.2g}" for value in dict.fromkeys((min(rates), max(rates))))
            if rates
            else MISSING
        )
        first, last = count(stage.first_step), count(stage.last_step)
        rows.append(
            {
                "name": stage.name or f"stage {number}",
                "block_size": str(stage.block_size),
                "layout": stage.layout or MISSING,
                "steps": first if first == last else f"{first} {MISSING} {last}",
                "tokens": MISSING if tokens is None else short_count(tokens - consumed),
                "learning_rate": span,
                "first": nats(mean_of(stage.rows[:edge], "ce_masked")),
                "last": nats(mean_of(stage.rows[-edge:], "ce_masked")),
                "tint": tints[stage.block_size],
            }
        )
        consumed = consumed if tokens is None else tokens
    return rows


def sample_view(sample: GeneratedSample | None) -> dict[str, Any] | None:
    """The generated text, each token with the time it was filled in, and the steps of the blocks."""
    if sample is None:
        return None
    lead = f"Blocks of {sample.block_size} tokens, filled in from left to right."
    if sample.num_steps:
        rate = sample.num_tokens / sample.num_steps
        lead += (
            f" {sample.num_tokens} tokens took {sample.num_steps} denoising steps,"
            f" {significant(rate, 2)} tokens a step."
        )
    facts = [f"{key.replace('_', ' ')} {value}" for key, value in sample.facts.items() if key not in SAID_BEFORE]
    if facts:
        lead += f" {', '.join(facts).capitalize()}."
    tokens = [cell for block in sample.blocks for cell in _flow_cells(block)]
    shown, steps = 0, 0
    for block in sample.blocks:
        steps += len(block.snapshots)
        if shown and steps > SHOWN_STEPS:
            break
        shown += 1
    traces = [_trace(block) for block in sample.blocks]
    return {
        "lead": lead, "prompt": sample.prompt, "text": sample.text, "tokens": tokens,
        "shown": traces[:shown], "folded": traces[shown:],
    }  # fmt: skip


def _flow_cells(block: TracedBlock) -> list[dict[str, Any]]:
    revealed = block.revealed_at()
    last = max((step for step in revealed if step), default=1)
    cells: list[dict[str, Any]] = []
    for token, step in list(zip(block.tokens, revealed, strict=True))[block.given :]:
        when = 0.0 if step is None or last == 1 else (step - 1) / (last - 1)
        cells.append({"text": "[MASK]" if token is None else token.replace("\n", "↵\n"), "when": f"{when:.2f}"})
    return cells


def _trace(block: TracedBlock) -> dict[str, Any]:
    """Rows of one block; a masked cell has the width of the token that comes to stand there, so that columns hold."""
    widths = [max(display_width(_visible(token)) if token else 2, 1) for token in block.tokens]
    rows: list[dict[str, Any]] = []
    for step, (snapshot, fresh) in zip(block.step_numbers(), block.changes(), strict=True):
        cells: list[dict[str, Any]] = []
        for position, (token, width) in enumerate(zip(snapshot, widths, strict=True)):
            if token is None:
                cells.append({"state": "masked", "text": "", "width": width})
            else:
                state = "given" if position < block.given else ("fresh" if fresh[position] else "")
                cells.append({"state": state, "text": _visible(token), "width": width})
        rows.append({"step": step, "cells": cells})
    return {"rows": rows}


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥") or "∅"


def display_width(text: str) -> int:
    """Columns of a monospaced font that ``text`` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(bool(unicodedata.combining(character)) for character in text)


def config_sections(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configuration as YAML, one entry a group; plain values of the top level come first, under "general"."""
    plain = {key: value for key, value in config.items() if not isinstance(value, (Mapping, list))}
    groups: dict[str, Any] = {"general": plain} if plain else {}
    groups.update({key: value for key, value in config.items() if isinstance(value, (Mapping, list)) and value})
    sections: list[dict[str, Any]] = []
    for name, value in groups.items():
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False, width=60)
        sections.append({"name": name, "lines": [_key_and_value(line) for line in text.splitlines()]})
    return sections


def _key_and_value(line: str) -> tuple[str, str]:
    key, separator, value = line.partition(": ")
    return (key + separator, value) if separator else (line, "")
