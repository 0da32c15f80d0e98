"""``llada-mega eval``: held-out losses of a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from llada_mega.commands.base import Command, model_path
from llada_mega.errors import ConfigError


@dataclass
class EvalOptions:
    """Keys of ``eval``."""

    checkpoint: Optional[str] = None  # checkpoint, or a run (its newest one)
    hf: Optional[str] = None  # instead: a Hugging Face directory or a .gguf file
    data: str = MISSING  # prefix of an indexed corpus of held-out documents
    block_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    windows: int = 64  # pieces of text
    sequence_length: int = 128  # tokens in a window
    noise_levels: int = 8  # bins of the mask level t in by_noise
    draws: int = 1  # masks of each window
    batch_size: int = 8  # windows in a forward pass
    seed: int = 0  # of noise levels and masks
    block_origin: str = "document"  # document | sequence
    device: str = "cpu"
    dtype: str = "float32"  # float32 | bfloat16 | float64
    output: Optional[str] = None  # JSON file; null: standard output only


def check(options: EvalOptions) -> None:
    """Refuses what cannot be evaluated, before the model is loaded."""
    model_path(options.checkpoint, options.hf)
    length = options.sequence_length
    wrong = [size for size in options.block_sizes if not 1 <= size <= length]
    if wrong:
        raise ConfigError(f"block_sizes={wrong[0]} does not fit sequence_length={length}; use 1 to {length}")
    uneven = [size for size in options.block_sizes if length % size]
    if options.block_origin == "sequence" and uneven:
        raise ConfigError(
            f"block_sizes={uneven[0]} does not divide sequence_length={length}, as block_origin=sequence needs; "
            "use a divisor, or block_origin=document"
        )


def run(options: EvalOptions) -> int:
    """Prints the result as JSON (for a reader at a terminal also as a table) and writes it to ``output``."""
    from rich.console import Console
    from rich.progress import Progress

    from llada_mega.evaluation.run import run_eval
    from llada_mega.reporting.terminal import render_eval

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        result = run_eval(
            model_path(options.checkpoint, options.hf),
            options.data,
            output=options.output,
            block_sizes=options.block_sizes,
            sequence_length=options.sequence_length,
            windows=options.windows,
            noise_levels=options.noise_levels,
            draws=options.draws,
            batch_size=options.batch_size,
            block_origin=options.block_origin,
            seed=options.seed,
            device=options.device,
            dtype=options.dtype,
            on_pass=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(json.dumps(result, indent=2))
    if console.is_terminal:
        console.print(render_eval(result))
    return 0


COMMAND = Command(
    name="eval",
    summary="measure AR loss, masked cross entropy, NLL bound and accuracy on held-out text",
    example="llada-mega eval checkpoint=runs/first data=data/heldout block_sizes=[1,8,32] output=eval.json",
    options=EvalOptions,
    run=run,
    check=check,
    positional="checkpoint",
)
