"""``llada-mega plan``: will a run fit, how fast and how long; no GPU needed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from llada_mega.commands.base import Command
from llada_mega.commands.train import model_from_init
from llada_mega.config.checks import require
from llada_mega.planning.options import PlanOptions


def check(options: PlanOptions) -> None:
    """Refuses a run that could not start."""
    from llada_mega.planning.plan import prepare

    require(not options.search or options.gpus is not None, "search=true needs the number of devices; give gpus=512")
    if options.model.architecture == "from_init":
        options.model = model_from_init(options)
    prepare(options)


def run(options: PlanOptions) -> int:
    """Prints the plan, or the layouts that a search found, and writes them where ``output`` says."""
    from rich.console import Console

    from llada_mega.planning.plan import make_plan
    from llada_mega.planning.search import search_layouts
    from llada_mega.planning.tables import render, render_search

    console = Console()
    if options.search:
        assert options.gpus is not None
        found = search_layouts(options)
        result = dataclasses.asdict(found)
        console.print(render_search(found, options.gpus))
    else:
        plan = make_plan(options)
        result = dataclasses.asdict(plan)
        console.print(render(plan))
    if options.output is not None:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


COMMAND = Command(
    name="plan",
    summary="say whether a run fits, how fast it will be and how long it takes; no GPU is needed",
    example="llada-mega plan experiment=cpt_100b gpus=512 hardware.device=h200 output=plan.json\n"
    "llada-mega plan experiment=cpt_16b search=true gpus=64",
    options=PlanOptions,
    run=run,
    check=check,
)
