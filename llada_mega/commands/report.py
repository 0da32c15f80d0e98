"""``llada-mega report``: a run as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from llada_mega.commands.base import Command


@dataclass
class ReportOptions:
    """Keys of ``report``."""

    run: str = MISSING  # directory of the run; it may still be going on


def run(options: ReportOptions) -> int:
    """Writes ``report.html`` into the run and says where."""
    from llada_mega.reporting.report import write_report

    print(f"report: {write_report(Path(options.run))}")
    return 0


COMMAND = Command(
    name="report",
    summary="write a run's curves, tables and samples as one self-contained HTML page",
    example="llada-mega report runs/quickstart",
    options=ReportOptions,
    run=run,
    positional="run",
)
