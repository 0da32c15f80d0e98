"""``llada-mega report``: a run as one HTML page, or several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from llada_mega.commands.base import Command
from llada_mega.errors import ConfigError


@dataclass
class ReportOptions:
    """Keys of ``report``."""

    runs: list[str] = MISSING  # directory of a run, which may still be going on; several are compared
    output: Optional[str] = None  # of a comparison; null: comparison.html in the directory that all runs lie in


def check(options: ReportOptions) -> None:
    """Raises ConfigError when keys do not go together."""
    if not options.runs:
        raise ConfigError("runs=[] names no run; give the directory of one, or of several to compare")
    if options.output is not None and len(options.runs) == 1:
        raise ConfigError(f"output={options.output} is for a comparison; the report of one run is RUN/report.html")


def run(options: ReportOptions) -> int:
    """Writes the page and says where."""
    from llada_mega.reporting.report import write_comparison, write_report

    directories = [Path(run) for run in options.runs]
    if len(directories) == 1:
        print(f"report: {write_report(directories[0])}")
    else:
        print(f"comparison: {write_comparison(directories, Path(options.output) if options.output else None)}")
    return 0


COMMAND = Command(
    name="report",
    summary="write a run's curves, tables and samples as one self-contained HTML page, or compare several runs in one",
    example="llada-mega report runs/quickstart\nllada-mega report runs/first runs/second output=comparison.html",
    options=ReportOptions,
    run=run,
    check=check,
    positional="runs",
    many=True,
)
