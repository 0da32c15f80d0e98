"""``python -m bench``: what `make bench` runs; every part is a program of its own, ``python -m bench.PART``.

Parts: ``step`` (one step against the plain one and the floor), ``scaling`` (over length, documents, block size and
experts), ``data`` (tokens a second of the pipeline, and what a step waits for it), ``save`` (what a checkpoint holds
up), ``optimizer`` (AdamW's implementations). They run in turn, on one thread; results are JSON beside the machine they
come from, and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import data_pipeline, optimizer_step, save_stall, scaling, step
from bench.figure import write_data, write_scaling
from bench.layout_table import cpu_model
from llada_mega.parallel import destroy
from llada_mega.ranks import usable_cores

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def run_step(output: Path, images: Path) -> Any:
    """One step against the plain one and the floor (:mod:`bench.step`)."""
    report = step.measure(step.prepare(step.benchmark_model(), [step.LENGTH], step.BLOCK_SIZE), repeats=15)
    print("\n".join(f"{name:34}{value}" for name, value in asdict(report).items()))
    return asdict(report)


def run_scaling(output: Path, images: Path) -> Any:
    """Length, documents, block size and experts, one at a time (:mod:`bench.scaling`)."""
    points = scaling.sweep(repeats=3)
    write_scaling(points, images / "bench_scaling.png")
    return [asdict(point) for point in points]


def run_data(output: Path, images: Path) -> Any:
    """Tokens a second of the pipeline, and what a step waits for it (:mod:`bench.data_pipeline`)."""
    rates, waits = data_pipeline.measure()
    write_data(rates, images / "bench_data.png")
    return {"rates": [asdict(rate) for rate in rates], "waits": [asdict(wait) for wait in waits]}


def run_save(output: Path, images: Path) -> Any:
    """What a checkpoint holds up (:mod:`bench.save_stall`)."""
    result = save_stall.measure(output)
    print(save_stall.text(result))
    return asdict(result)


def run_optimizer(output: Path, images: Path) -> Any:
    """AdamW's implementations (:mod:`bench.optimizer_step`)."""
    result = optimizer_step.measure()
    print(optimizer_step.text(result))
    return asdict(result)


PARTS: dict[str, Callable[[Path, Path], Any]] = {
    "step": run_step,
    "scaling": run_scaling,
    "data": run_data,
    "save": run_save,
    "optimizer": run_optimizer,
}


def machine() -> dict[str, str | float]:
    """What the numbers come from."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }


def main() -> None:
    """Runs the parts that are asked for and writes ``PART.json`` for each."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="JSON, corpus and scratch runs")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the pictures go")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]}; use {', '.join(PARTS)}")
    torch.set_num_threads(1)
    output: Path = options.output.resolve()
    for folder in (output, options.images):
        folder.mkdir(parents=True, exist_ok=True)
    for name in options.parts or PARTS:
        print(f"\n{name}: {str(PARTS[name].__doc__).partition(' (')[0]}", flush=True)
        content = {
            "command": f"python -m bench {name}",
            "machine": machine(),
            "result": PARTS[name](output, options.images),
        }
        destroy()  # the process groups of a part's models: a training run makes its own
        path = output / f"{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
