"""``llada-mega report RUN``: one HTML page, self-contained, without scripts."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from llada_mega.errors import DataError
from llada_mega.reporting import page
from llada_mega.reporting.comparison import compare_run
from llada_mega.reporting.facts import findings, header_facts, status
from llada_mega.reporting.palette import palette_css
from llada_mega.reporting.plots import all_plots
from llada_mega.reporting.record import RunRecord, read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what the run has written so far, and return its path.

    Raises DataError when ``run_dir`` is not the directory of a run or cannot be written.
    """
    record = read_run(Path(run_dir))
    path = record.directory / REPORT_FILE
    partial = path.with_suffix(".html.partial")
    try:
        partial.write_text(render_report(record), encoding="utf-8")
        partial.replace(path)  # a reader of the old page never sees half of the new one
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}); free space or check permissions") from error
    return path


def render_report(record: RunRecord) -> str:
    """The page as HTML."""
    loader = jinja2.PackageLoader("llada_mega.reporting")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    plots = all_plots(record)
    table = compare_run(record)
    return environment.get_template("report.html.j2").render(
        css=Markup(palette_css() + loader.get_source(environment, "report.css")[0]),
        name=record.name,
        status=status(record),
        facts=header_facts(record),
        headline=page.headline_cards(record, table),
        warnings=[*record.warnings, *findings(record)],
        notes=record.notes,
        has_steps=bool(record.training),
        comparison=page.comparison_view(record, table),
        sample=page.sample_view(record.sample),
        loss_plots=[plot for plot in plots if plot.group == "losses"],
        machine_plots=[plot for plot in plots if plot.group == "machine"],
        stages=page.stage_rows(record),
        config=page.config_sections(record.config),
        footer=f"Written by llada-mega from {record.directory}",
    )
