"""Read a run directory, also one that is still being written.

``metrics.jsonl`` has one object a logged step (``step stage block_size layout consumed_samples consumed_tokens loss
ce_masked mask_ratio grad_norm lr tokens_per_s ...``) and validation rows (``step`` and ``valid/...`` values). After a
resume the step goes back and rows repeat: the last row of a step wins. A row may carry ``warning``, a line of text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llada_mega.errors import DataError
from llada_mega.reporting.sample import SAMPLE_FILE, GeneratedSample, parse_sample

Row = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class StageSpan:
    """Consecutive logged steps of one stage of the curriculum."""

    name: str
    block_size: int
    layout: str
    rows: list[Row]

    @property
    def first_step(self) -> int:
        """First logged step of the stage."""
        return int(self.rows[0]["step"])

    @property
    def last_step(self) -> int:
        """Last logged step of the stage."""
        return int(self.rows[-1]["step"])


@dataclass(frozen=True)
class RunRecord:
    """Everything a report shows, as it was found.

    ``training`` and ``validation`` are sorted by step, one row a step. ``notes`` say what was odd in the files,
    ``warnings`` what the run itself warned about.
    """

    directory: Path
    config: dict[str, Any]
    training: list[Row]
    validation: list[Row]
    stages: list[StageSpan]
    summary: dict[str, Any] = field(default_factory=dict)
    eval_before: dict[str, Any] = field(default_factory=dict)
    eval_after: dict[str, Any] = field(default_factory=dict)
    sample: GeneratedSample | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's configured name, else its directory's."""
        return str(self.section("run").get("name") or self.directory.resolve().name)

    def section(self, *keys: str) -> dict[str, Any]:
        """A part of the configuration, empty when it is absent or not a mapping."""
        node: Any = self.config
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node if isinstance(node, dict) else {}


def read_run(run_dir: Path) -> RunRecord:
    """Read ``run_dir``. Raises DataError when it is not the directory of a run.

    Files that are missing are left out; files that are damaged are left out with a note.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory; give the directory that a training run wrote")
    if not (run_dir / METRICS_FILE).is_file() and not (run_dir / CONFIG_FILE).is_file():
        raise DataError(
            f"{run_dir}: not a run directory, it has neither {METRICS_FILE} nor {CONFIG_FILE}; "
            "give the directory that a training run wrote, such as runs/quickstart"
        )
    notes: list[str] = []
    config = _read_config(run_dir / CONFIG_FILE, notes)
    training, validation, warnings = _read_metrics(run_dir / METRICS_FILE, notes)
    return RunRecord(
        directory=run_dir,
        config=config,
        training=training,
        validation=validation,
        stages=_split_stages(training, config),
        summary=_read_object(run_dir / "summary.json", notes),
        eval_before=_read_object(run_dir / "eval_before.json", notes),
        eval_after=_read_object(run_dir / "eval_after.json", notes),
        sample=_read_sample(run_dir / SAMPLE_FILE, notes),
        notes=notes,
        warnings=warnings,
    )


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"{path.name} is missing: the configuration and what follows from it are not shown.")
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} could not be read as YAML: the configuration is not shown.")
        return {}
    return content


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is not a JSON object and was left out.")
        return {}
    return content


def _read_sample(path: Path, notes: list[str]) -> GeneratedSample | None:
    content = _read_object(path, notes)
    if not content:
        return None
    try:
        return parse_sample(content, path.name)
    except DataError as error:
        notes.append(f"{error}; it was left out.")
        return None


def _read_metrics(path: Path, notes: list[str]) -> tuple[list[Row], list[Row], list[str]]:
    training: dict[int, Row] = {}
    validation: dict[int, Row] = {}
    warnings: dict[str, None] = {}  # an ordered set: a resumed segment repeats its warnings
    resumed_at: list[int] = []
    last_step: int | None = None
    for row in _metric_rows(path, notes):
        step = row["step"]
        if last_step is not None and step < last_step:
            resumed_at.append(step)
        last_step = step
        if "loss" in row:
            training[step] = row
        if any(key.startswith("valid/") for key in row):
            validation[step] = row
        if row.get("warning"):
            warnings[f"step {step}: {row['warning']}"] = None
    if resumed_at:
        where = ", ".join(str(step) for step in resumed_at)
        notes.append(f"The run was resumed (at step {where}); of steps logged more than once the last is shown.")
    return _by_step(training), _by_step(validation), list(warnings)


def _by_step(rows: dict[int, Row]) -> list[Row]:
    return [rows[step] for step in sorted(rows)]


def _metric_rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """Yield the objects that have an integer ``step``; note a torn last line and lines that are something else."""
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    damaged: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
        elif number == len(lines):  # no newline after it: the writer was at work, or was stopped
            notes.append(f"The last line of {path.name} is incomplete and was left out.")
        else:
            damaged.append(number)
    if damaged:
        lines_are = "line is" if len(damaged) == 1 else "lines are"
        notes.append(f"{len(damaged)} {lines_are} no row of {path.name} and left out (first: line {damaged[0]}).")


def _split_stages(training: list[Row], config: dict[str, Any]) -> list[StageSpan]:
    spans: list[StageSpan] = []
    previous: tuple[Any, ...] | None = None
    for row in training:
        key = (row.get("stage"), row.get("block_size"), row.get("layout"))
        if key != previous:
            name = _stage_name(row.get("stage"), config)
            spans.append(StageSpan(name, int(row.get("block_size") or 0), str(row.get("layout") or ""), []))
            previous = key
        spans[-1].rows.append(row)
    return spans


def _stage_name(stage: Any, config: dict[str, Any]) -> str:
    """A stage is logged by its index or its name; the name is in the configuration."""
    curriculum = config.get("curriculum")
    stages = curriculum.get("stages") if isinstance(curriculum, dict) else None
    if isinstance(stage, int) and isinstance(stages, list) and 0 <= stage < len(stages):
        entry = stages[stage]
        if isinstance(entry, dict) and entry.get("name"):
            return str(entry["name"])
    return "" if stage is None else str(stage)
