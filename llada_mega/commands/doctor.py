"""``llada-mega doctor``: what this machine has."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from llada_mega.commands.base import Command
from llada_mega.config.checks import at_least, one_of


@dataclass
class DoctorOptions:
    """Keys of ``doctor``."""

    json: bool = False  # print JSON instead of tables
    head_dim: int = 128  # channels of the attention heads that backends are judged for
    dtype: str = "bfloat16"  # float32 | bfloat16, of the parameters


def check(options: DoctorOptions) -> None:
    """Refuses what no model has."""
    at_least(1, head_dim=options.head_dim)
    one_of("dtype", options.dtype, ("float32", "bfloat16"))


def run(options: DoctorOptions) -> int:
    """Prints the diagnosis."""
    import torch
    from rich.console import Console

    from llada_mega.planning.doctor import diagnose, render

    diagnosis = diagnose(options.head_dim, getattr(torch, options.dtype))
    if options.json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        Console().print(render(diagnosis))
    return 0


COMMAND = Command(
    name="doctor",
    summary="show what this machine has, what a run would use of it, and what is missing at what cost",
    example="llada-mega doctor\nllada-mega doctor json=true",
    options=DoctorOptions,
    run=run,
    check=check,
)
