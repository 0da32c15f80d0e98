"""``llada-mega report``: one run, or several side by side, as one HTML page, self-contained, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llada_mega.errors import DataError
from llada_mega.reporting import page
from llada_mega.reporting.comparison import compare_run
from llada_mega.reporting.facts import findings, header_facts, status
from llada_mega.reporting.overlay import overlay_plots, run_indices
from llada_mega.reporting.palette import palette_css
from llada_mega.reporting.plots import all_plots
from llada_mega.reporting.record import RunRecord, read_run
from llada_mega.reporting.runs import Runs, config_differences, default_output, read_runs, results
from llada_mega.reporting.svg import Plot

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what the run has written so far, and return its path.

    Raises DataError when ``run_dir`` is not the directory of a run or cannot be written.
    """
    record = read_run(Path(run_dir))
    return _write(record.directory / REPORT_FILE, render_report(record))


def write_comparison(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page that compares runs, and return its path.

    Args:
        run_dirs: directories of two runs or more.
        output: the file; None: ``comparison.html`` in the directory that all of them lie in.

    Raises DataError when one is no run's directory or is given twice, or the page cannot be written.
    """
    runs = read_runs(run_dirs)
    return _write(output or default_output(run_dirs), render_comparison(runs))


def render_report(record: RunRecord) -> str:
    """The page of one run as HTML."""
    table = compare_run(record)
    return _render(
        "report.html.j2",
        name=record.name,
        status=status(record),
        facts=header_facts(record),
        headline=page.headline_cards(record, table),
        warnings=[*record.warnings, *findings(record)],
        notes=record.notes,
        has_steps=bool(record.training),
        comparison=page.comparison_view(record, table),
        sample=page.sample_view(record.sample),
        **_by_group(all_plots(record)),
        stages=page.stage_rows(record),
        config=page.config_sections(record.config),
        footer=f"Written by llada-mega from {record.directory}",
    )


def render_comparison(runs: Runs) -> str:
    """The page of several runs as HTML."""
    return _render(
        "comparison.html.j2",
        names=list(runs),
        tints=[f"--series-{index}" for index in run_indices(runs).values()],
        notes=[f"{name}: {note}" for name, record in runs.items() for note in record.notes],
        results=results(runs),
        differences=config_differences(runs),
        **_by_group(overlay_plots(runs)),
        footer=f"Written by llada-mega from {', '.join(str(record.directory) for record in runs.values())}",
    )


def _by_group(plots: Sequence[Plot]) -> dict[str, list[Plot]]:
    groups = {"loss_plots": "losses", "machine_plots": "machine"}
    return {name: [plot for plot in plots if plot.group == group] for name, group in groups.items()}


def _render(template: str, **values: Any) -> str:
    loader = jinja2.PackageLoader("llada_mega.reporting")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    css = Markup(palette_css() + loader.get_source(environment, "report.css")[0])
    return environment.get_template(template).render(css=css, **values)


def _write(path: Path, html: str) -> Path:
    partial = path.with_suffix(".html.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)  # a reader of the old page never sees half of the new one
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}); free space or check permissions") from error
    return path
