"""``llada-mega convert export``: a checkpoint becomes a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from llada_mega.commands.base import Command


@dataclass
class ConvertExportOptions:
    """Keys of ``convert export``."""

    checkpoint: str = MISSING  # checkpoint, or a run (its newest one)
    output: str = MISSING  # directory of the new Hugging Face model
    block_size: Optional[int] = None  # decoding block, written into the configuration; null: 32 for LLaDA2
    dtype: Optional[str] = None  # float32 | bfloat16 | float16; null: that of the checkpoint
    max_shard_size: str = "5GB"  # of one safetensors file
    experts: str = "separate"  # separate: as published | stacked: one tensor a layer, for published fine-tuning code
    overwrite: bool = False  # replace output


def run(options: ConvertExportOptions) -> int:
    """Writes the Hugging Face directory."""
    from llada_mega.checkpoint.convert import export_model
    from llada_mega.commands.progress import bytes_progress
    from llada_mega.parallel.workers import Workers

    workers = Workers.from_launcher()
    with bytes_progress("exporting", enabled=workers.is_first) as progress:
        notes = export_model(
            Path(options.checkpoint),
            Path(options.output),
            block_size=options.block_size,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            experts=options.experts,
            overwrite=options.overwrite,
            workers=workers,
            progress=progress,
        )
    if workers.is_first:
        print(*(f"note: {note}" for note in notes), f"Hugging Face model: {options.output}", sep="\n")
    return 0


COMMAND = Command(
    name="convert export",
    summary="turn a checkpoint into a Hugging Face directory; torchrun shares the work",
    example="llada-mega convert export checkpoint=runs/quickstart output=models/smollm2-diffusion block_size=8",
    options=ConvertExportOptions,
    run=run,
    positional="checkpoint",
)
