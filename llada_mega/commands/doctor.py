"""``llada-mega doctor``: what this machine has, and whether runs can work on it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from llada_mega.commands.base import Command
from llada_mega.config.checks import at_least, one_of


@dataclass
class DoctorOptions:
    """Keys of ``doctor``."""

    json: bool = False  # print JSON instead of tables
    head_dim: int = 128  # channels of the attention heads that backends are judged for
    dtype: str = "bfloat16"  # float32 | bfloat16, of the parameters
    path: str = "."  # where runs will be written: its free space is looked at
    require: list[str] = field(default_factory=list)  # parts that must be usable, as in [CUDA,NCCL,transformer-engine]
    output: str | None = None  # write the JSON to this file too


def check(options: DoctorOptions) -> None:
    """Refuses what no model has."""
    at_least(1, head_dim=options.head_dim)
    one_of("dtype", options.dtype, ("float32", "bfloat16"))


def run(options: DoctorOptions) -> int:
    """Prints the diagnosis; the exit status is 1 when there is a problem."""
    import torch
    from rich.console import Console

    from llada_mega.planning.doctor import diagnose, render

    diagnosis = diagnose(options.head_dim, getattr(torch, options.dtype), options.path, options.require)
    text = json.dumps(dataclasses.asdict(diagnosis), indent=2)
    if options.output is not None:
        Path(options.output).write_text(text + "\n", "utf-8")
    if options.json:
        print(text)
    else:
        Console().print(render(diagnosis))
    return 1 if diagnosis.problems else 0


COMMAND = Command(
    name="doctor",
    summary="show what this machine has, what a run would use of it, and what is missing at what cost",
    example="llada-mega doctor\nllada-mega doctor require=[CUDA,NCCL,transformer-engine] json=true",
    options=DoctorOptions,
    run=run,
    check=check,
)
