"""``llada-mega checkpoint inspect``: what is in it?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from llada_mega.commands.base import Command


@dataclass
class CheckpointInspectOptions:
    """Keys of ``checkpoint inspect``."""

    path: str = MISSING  # checkpoint, or a run (its newest one)
    tensors: bool = True  # list every tensor with its type and shape


def run(options: CheckpointInspectOptions) -> int:
    """Prints the model, the training state and the tensors."""
    from llada_mega.checkpoint.checkpoint import read_model_config, read_state, resolve_checkpoint, tokenizer_directory
    from llada_mega.checkpoint.storage import read_index

    path = resolve_checkpoint(Path(options.path))
    tokenizer = tokenizer_directory(path)
    print(f"checkpoint: {path}")
    print(f"tokenizer:  {tokenizer or 'none'}")
    print(f"model:      {read_model_config(path)}")
    print(f"state:      {json.dumps(read_state(path))}")
    index = read_index(path)
    print(f"tensors:    {len(index)}")
    if options.tensors:
        width = max(map(len, index), default=0)
        for name, entry in sorted(index.items()):
            print(f"  {name:{width}}  {entry.dtype:9} {list(entry.global_shape)}")
    return 0


COMMAND = Command(
    name="checkpoint inspect",
    summary="show a checkpoint's model, training state and tensors",
    example="llada-mega checkpoint inspect runs/quickstart",
    options=CheckpointInspectOptions,
    run=run,
    positional="path",
)
