"""Steps per second, memory and traffic of every layout, as a table in ``docs/parallelism.md``."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.corpus import prepare_corpus
from llada_mega.commands.processes import start_processes
from llada_mega.ranks import usable_cores

START, END = "<!-- table of make bench-layouts -->", "<!-- end of the table -->"
TIMED_STEPS = 3
LAYERS, LENGTH, GLOBAL_BATCH, BLOCK_SIZE = 4, 512, 4, 32
RUN = (
    "model=tiny_ling",
    f"model.num_layers={LAYERS}",
    f"data.sequence_length={LENGTH}",
    f"trainer.global_batch_size={GLOBAL_BATCH}",
    f"curriculum.stages=[{{name: only, block_size: {BLOCK_SIZE}, tokens: 1000000}}]",
)
SEQUENCE = ("tp=2", "sp=true")


@dataclass(frozen=True)
class Layout:
    """A row: processes and settings of ``parallel``."""

    name: str
    nproc: int
    parallel: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # overrides outside ``parallel``

    def overrides(self) -> list[str]:
        """What is added to the command line of the run."""
        return [*(f"parallel.{setting}" for setting in self.parallel), *self.others]


LAYOUTS = (
    Layout("1 process", 1),
    Layout("DP2", 2),
    Layout("DP2, distributed optimizer", 2, ("distributed_optimizer=true",)),
    Layout("TP2 + SP", 2, SEQUENCE),
    Layout("PP2", 2, ("pp=2",)),
    Layout("PP2 x VP2", 2, ("pp=2", "vp=2")),
    Layout("CP2", 2, ("cp=2",)),
    Layout("CP2, full recomputation", 2, ("cp=2", "recompute=full")),
    Layout("EP2, all-to-all", 2, ("ep=2",)),
    Layout("EP2, all-gather", 2, ("ep=2", "dispatcher=allgather"), ("data.clean_tokens=all",)),
    Layout("TP2 x PP2", 4, (*SEQUENCE, "pp=2")),
    Layout("CP2 x EP2", 2, ("cp=2", "ep=2")),
    Layout("TP2 x PP2 x EP2", 8, (*SEQUENCE, "pp=2", "ep=2")),
)


def measure_layouts(directory: Path, layouts: Sequence[Layout], say: Callable[[str], None] = print) -> dict[str, Any]:
    """What the ranks of every layout measured, by name, from one launch each."""
    corpus = prepare_corpus(directory / "corpus")
    results = {}
    for layout in layouts:
        output = directory / "ranks.json"
        output.unlink(missing_ok=True)
        command = (sys.executable, "-m", "bench.layout_worker", str(output), str(TIMED_STEPS))
        arguments = [*RUN, *corpus, "run.name=layouts", f"run.dir={directory / 'layouts'}", *layout.overrides()]
        status = start_processes(layout.nproc, arguments, directory / "layouts", command)
        if status:
            raise SystemExit(f"{layout.name}: the ranks ended with status {status}")
        ranks = results[layout.name] = json.loads(output.read_text())
        say(f"{row(layout, ranks)}\n    {operations(ranks)}")
    return results


def row(layout: Layout, ranks: list[dict[str, Any]]) -> str:
    """One line of the table."""
    seconds = median(max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True))
    memory = max(rank["peak_mib"] - rank["base_mib"] for rank in ranks)
    sent, expected = average(ranks, "sent"), average(ranks, "expected")
    axes = [axis for axis in ("tp", "pp", "cp", "ep", "dp") if axis in sent or axis in expected]
    counted = "<br>".join(f"{axis} {sent.get(axis, 0) / 2**20:.2f}" for axis in axes)
    formula = "<br>".join(f"{expected.get(axis, 0) / 2**20:.2f}" for axis in axes)
    ratio = "<br>".join(f"{sent[axis] / expected[axis]:.3f}" if axis in expected else "-" for axis in axes)
    other = f"{sent.get('other', 0):,.0f}"
    settings = " ".join(layout.overrides())
    name = f"{layout.name}<br>`{settings}`" if settings else layout.name
    cells = (name, layout.nproc, f"{1 / seconds:.2f}", f"{memory:.0f}", counted, formula, ratio, other)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def average(ranks: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Bytes by axis, the mean over ranks."""
    names = Counter(name for rank in ranks for name in rank[key])
    return {name: mean(rank[key].get(name, 0.0) for rank in ranks) for name in names}


def operations(ranks: list[dict[str, Any]]) -> str:
    """What the counted bytes are made of."""
    return ", ".join(f"{name} {sent / 2**20:.3f}" for name, sent in sorted(average(ranks, "operations").items()))


def table(results: dict[str, Any]) -> str:
    """The table with a line about the machine."""
    lines = [
        f"{cpu_model()}, {usable_cores()} cores for all processes, one thread each; {date.today().isoformat()}. "
        f"`model=tiny_ling` with {LAYERS} layers and a vocabulary of 2048, float32, {GLOBAL_BATCH} samples of "
        f"{LENGTH} tokens a step, block size {BLOCK_SIZE}; median of {TIMED_STEPS} steps.",
        "",
        "| layout | processes | steps/s | memory, MiB | counted, MiB | formula, MiB | ratio | other, bytes |",
        "|---|---|---|---|---|---|---|---|",
        *(row(layout, results[layout.name]) for layout in LAYOUTS if layout.name in results),
    ]
    return "\n".join(lines)


def replace_table(page: Path, text: str) -> None:
    """Put ``text`` between the markers of ``page``."""
    before, rest = page.read_text("utf-8").split(START)
    page.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")


def cpu_model() -> str:
    """The processor's name."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return found[1] if found else platform.processor() or platform.machine()
