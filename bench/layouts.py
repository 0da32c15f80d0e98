"""``python -m bench.layouts [--figure] [--table] [--output DIR]``: what `make bench-layouts` runs.

The figure is one training run moved over four layouts, against the run left alone (about four minutes); the table says
what a step costs and communicates under every layout (about four minutes). Without either option both are made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.layout_table import LAYOUTS, measure_layouts, replace_table, table
from bench.moved_run import train_all
from bench.moved_run_figure import write_figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PICTURE = DOCS / "parallelism.md", DOCS / "images" / "layouts.png"


def main() -> None:
    """Trains and measures in ``--output``, then writes the picture and the table of the documentation."""
    options = _options()
    output: Path = options.output.resolve()
    both = options.figure == options.table
    if options.figure or both:
        write_figure(train_all(output), PICTURE)
        print(f"wrote {PICTURE}")
    if options.table or both:
        results = measure_layouts(output, LAYOUTS)
        (output / "layouts.json").write_text(json.dumps(results, indent=1) + "\n")
        replace_table(PAGE, table(results))
        print(f"wrote {output}/layouts.json and the table of {PAGE}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", action="store_true", help="train, and draw docs/images/layouts.png")
    parser.add_argument("--table", action="store_true", help="measure, and write the table of docs/parallelism.md")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/layouts"),
        help="corpus, runs and JSON; finished runs in it are not repeated",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
