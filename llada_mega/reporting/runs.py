"""Several runs side by side: what they were asked to do differently, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llada_mega.errors import DataError
from llada_mega.reporting.axes import recent_mean, series
from llada_mega.reporting.comparison import validation_as_evaluation
from llada_mega.reporting.facts import status
from llada_mega.reporting.formatting import MISSING, count, duration, finite, nats, percent, short_count, significant
from llada_mega.reporting.record import Row, RunRecord, read_run

Runs = Mapping[str, RunRecord]  # by the name that the page calls them
Differences = list[tuple[str, list[str]]]  # dotted key, its value in every run

_ABSENT = object()
_OWN_KEYS = ("run.name", "run.dir")  # differ in any two runs


def read_runs(directories: Sequence[Path]) -> dict[str, RunRecord]:
    """Runs under names that tell them apart: their own, else as much of their directory as it takes.

    Raises:
        DataError: a directory is no run's, or is given twice.
    """
    records = [read_run(directory) for directory in directories]
    places = [record.directory.resolve() for record in records]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise DataError(f"{twice} is given twice; name each run once")
    for names in _candidates(records, places):
        if len(set(names)) == len(names):
            return dict(zip(names, records, strict=True))
    raise AssertionError("resolved directories are different")


def _candidates(records: Sequence[RunRecord], places: Sequence[Path]) -> list[list[str]]:
    depth = max(len(place.parts) for place in places)
    tails = [["/".join(place.parts[-parts:]) for place in places] for parts in range(1, depth + 1)]
    return [[record.name for record in records], *tails]


def config_differences(runs: Runs) -> Differences:
    """Keys of the configuration whose values are not the same in all runs, in the order of the first run's file.

    A key that a run does not have is an en dash there.
    """
    flat = [_flatten(record.config) for record in runs.values()]
    keys = dict.fromkeys(key for config in flat for key in config if key not in _OWN_KEYS)
    rows = [(key, [config.get(key, _ABSENT) for config in flat]) for key in keys]
    return [(key, [_shown(value) for value in values]) for key, values in rows if any(v != values[0] for v in values)]


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; elements of lists of mappings by index, other lists as one value."""
    if isinstance(node, dict) and node:
        children = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items()]
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        children = [(f"{prefix}[{index}]", item) for index, item in enumerate(node)]
    else:
        return {prefix: node}
    return {key: leaf for path, child in children for key, leaf in _flatten(child, path).items()}


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, default=str)


def results(runs: Runs) -> list[tuple[str, list[str]]]:
    """Rows of the table of results: a name and a value a run. Rows that no run has a value for are left out."""
    sizes = sorted({size for record in runs.values() for size in _held_out(record)})
    rows: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("state", lambda record: status(record)[1]),
        ("steps", lambda record: _last(record, "step", count)),
        ("tokens", lambda record: _last(record, "consumed_tokens", short_count)),
        ("training CE per masked token", lambda record: _recent(record, "ce_masked", nats)),
        *((f"held-out CE, block {size}", _held_out_cell(size)) for size in sizes),
        ("held-out AR loss", lambda record: _newest(record.validation, "valid/ar_nll", nats)),
        ("data tokens/s", lambda record: _recent(record, "tokens_per_s", lambda rate: significant(rate, 3))),
        ("TFLOP/s per device", lambda record: _recent(record, "tflops_per_device", lambda rate: significant(rate, 3))),
        ("MFU", lambda record: _recent(record, "mfu", percent)),
        ("memory, GiB", lambda record: _recent(record, "memory_gib", lambda size: significant(size, 3))),
        ("busiest expert over mean", lambda record: _recent(record, "expert_load_max_over_mean", significant)),
        ("dead experts", lambda record: _last(record, "dead_experts", count)),
        ("time in training", lambda record: _last(record, "train_seconds", duration)),
        ("goodput", lambda record: _last(record, "goodput", percent)),
    ]
    table = [(name, [cell(record) for record in runs.values()]) for name, cell in rows]
    return [(name, cells) for name, cells in table if any(cell != MISSING for cell in cells)]


def _newest(rows: Sequence[Row], key: str, form: Callable[[float], str]) -> str:
    value = next((value for row in reversed(rows) if (value := finite(row.get(key))) is not None), None)
    return MISSING if value is None else form(value)


def _last(record: RunRecord, key: str, form: Callable[[float], str]) -> str:
    return _newest(record.training, key, form)


def _recent(record: RunRecord, key: str, form: Callable[[float], str]) -> str:
    """Mean of the last tenth of the logged steps."""
    return form(recent_mean(record.training, key)) if series(record.training, key)[0].size else MISSING


def _held_out(record: RunRecord) -> dict[int, float]:
    """Newest held-out cross entropy by block size."""
    found: dict[int, float] = {}
    for row in record.validation:
        for size, values in validation_as_evaluation(row)["block_sizes"].items():
            value = finite(values.get("ce_masked"))
            if value is not None:
                found[int(size)] = value
    return found


def _held_out_cell(size: int) -> Callable[[RunRecord], str]:
    return lambda record: nats(_held_out(record).get(size))


def default_output(directories: Sequence[Path]) -> Path:
    """``comparison.html`` in the directory that all runs lie in."""
    places = [directory.resolve() for directory in directories]
    common = places[0].parent
    while not all(place.is_relative_to(common) for place in places):
        common = common.parent
    return common / "comparison.html"


def slug(text: str) -> str:
    """``text`` as the id of an element."""
    return re.sub(r"\W+", "-", text).strip("-").lower()
