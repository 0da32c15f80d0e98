"""Compare two evaluations, or what stands in for them, as rows of a before/after table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llada_mega.reporting.formatting import finite
from llada_mega.reporting.record import RunRecord

KEPT_WITHIN = 0.1  # nats: an AR loss that moved less counts as kept


@dataclass(frozen=True)
class Comparison:
    """One quantity before and after training.

    ``kind``: "loss" (nats, lower is better), "kept" (nats, should not move) or "accuracy" (share, higher is better).
    """

    label: str
    kind: str
    before: float | None
    after: float | None
    block_size: int | None = None

    @property
    def change(self) -> float | None:
        """After minus before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def verdict(self) -> str:
        """better | worse | same | unknown."""
        change = self.change
        if change is None:
            return "unknown"
        if self.kind == "kept":
            return "same" if abs(change) <= KEPT_WITHIN else ("better" if change < 0 else "worse")
        if abs(change) < 5e-4:
            return "same"
        return "better" if (change > 0) == (self.kind == "accuracy") else "worse"


@dataclass(frozen=True)
class ComparisonTable:
    """Rows and where the two columns come from."""

    rows: list[Comparison]
    before_name: str
    after_name: str

    @property
    def headline(self) -> list[Comparison]:
        """The losses that sum a conversion up: masked cross entropy by block size, largest block first, and AR."""
        losses = [row for row in self.rows if row.block_size is not None and row.label == "Masked CE"]
        kept = [row for row in self.rows if row.kind == "kept"]
        return sorted(losses, key=lambda row: -(row.block_size or 0)) + kept


def block_sizes(evaluation: Mapping[str, Any]) -> list[int]:
    """Block sizes of an evaluation JSON, ascending."""
    return sorted(int(size) for size in evaluation.get("block_sizes", {}))


def by_noise(values: Any) -> dict[str, float]:
    """``by_noise`` of an evaluation as {"lo-hi": cross entropy}, in the order of the noise level."""
    levels: dict[str, float] = {}
    for level, value in (values if isinstance(values, Mapping) else {}).items():
        number = finite(value.get("ce_masked") if isinstance(value, Mapping) else value)
        if number is not None:
            levels[str(level)] = number
    return dict(sorted(levels.items(), key=lambda item: noise_bounds(item[0])))


def noise_bounds(level: str) -> tuple[float, float]:
    """'0.25-0.50' -> (0.25, 0.5). (0, 1) when it is not of that form."""
    match = re.fullmatch(r"\s*([\d.]+(?:e-?\d+)?)\s*-\s*([\d.]+(?:e-?\d+)?)\s*", level)
    return (float(match[1]), float(match[2])) if match else (0.0, 1.0)


def compare_evaluations(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Comparison]:
    """Rows of two evaluation JSONs: AR loss, then cross entropy, NLL bound and accuracy of every block size."""
    rows: list[Comparison] = []
    for size in sorted(set(block_sizes(before)) | set(block_sizes(after))):
        left = before.get("block_sizes", {}).get(str(size), {})
        right = after.get("block_sizes", {}).get(str(size), {})
        for key, label, kind in (
            ("ce_masked", "Masked CE", "loss"),
            ("nll_bound", "NLL bound", "loss"),
            ("accuracy", "Accuracy", "accuracy"),
        ):
            rows.append(Comparison(label, kind, finite(left.get(key)), finite(right.get(key)), size))
    rows.append(Comparison("AR loss", "kept", finite(before.get("ar_nll")), finite(after.get("ar_nll"))))
    return [row for row in rows if row.before is not None or row.after is not None]


def validation_as_evaluation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A validation row of metrics.jsonl in the shape of an evaluation JSON."""
    blocks: dict[str, dict[str, Any]] = {}
    for key, value in row.items():
        match = re.fullmatch(r"valid/block_(\d+)/(\w+)", key)
        if match:
            blocks.setdefault(match[1], {})[match[2]] = value
    return {"ar_nll": row.get("valid/ar_nll"), "block_sizes": blocks}


def compare_run(record: RunRecord) -> ComparisonTable | None:
    """The best before/after a run offers: evaluations, its summary, or its first and last validation.

    Where an evaluation is missing its place is taken by the validation at that end; what has one side only is shown
    alone, with an empty ``before_name``.
    """
    first = record.validation[0] if record.validation else None
    last = record.validation[-1] if record.validation else None
    sides = [
        (record.eval_before, "before"),
        (validation_as_evaluation(first), f"step {first['step']}") if first and last is not first else ({}, ""),
    ]
    ends = [
        (record.eval_after, "after"),
        (validation_as_evaluation(last), f"step {last['step']}") if last else ({}, ""),
    ]
    before, before_name = next(((side, name) for side, name in sides if side), ({}, ""))
    after, after_name = next(((side, name) for side, name in ends if side), ({}, ""))
    summary = _compare_summary(record.summary)
    if summary and not (record.eval_before and record.eval_after):
        return ComparisonTable(summary, "before", "after")
    if not after:
        before, before_name, after, after_name = {}, "", before, "before training"
    rows = compare_evaluations(before, after)
    return ComparisonTable(rows, before_name, after_name) if rows else None


def _compare_summary(summary: Mapping[str, Any]) -> list[Comparison]:
    """Rows of summary.json: ``block8_ce_before`` and ``_after``, ``ar_nll_before`` and ``_after``."""
    matches = [re.fullmatch(r"block(\d+)_ce_(?:before|after)", key) for key in summary]
    rows: list[Comparison] = []
    for size in sorted({int(match[1]) for match in matches if match}):
        before, after = (finite(summary.get(f"block{size}_ce_{when}")) for when in ("before", "after"))
        rows.append(Comparison("Masked CE", "loss", before, after, size))
    before, after = (finite(summary.get(f"ar_nll_{when}")) for when in ("before", "after"))
    rows.append(Comparison("AR loss", "kept", before, after))
    return [row for row in rows if row.before is not None or row.after is not None]
