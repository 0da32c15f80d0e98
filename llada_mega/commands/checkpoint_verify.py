"""``llada-mega checkpoint verify``: is it complete, do the checksums agree?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from llada_mega.commands.base import Command
from llada_mega.errors import CheckpointError


@dataclass
class CheckpointVerifyOptions:
    """Keys of ``checkpoint verify``."""

    path: str = MISSING  # checkpoint, a run (its newest one), or a directory that convert export wrote


def run(options: CheckpointVerifyOptions) -> int:
    """Reads every file of the checkpoint. Raises CheckpointError with what is wrong."""
    from llada_mega.checkpoint.convert import verify_model

    path, problems = verify_model(Path(options.path))
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
    print(f"{path} is complete and every checksum agrees")
    return 0


COMMAND = Command(
    name="checkpoint verify",
    summary="check that a checkpoint is complete and undamaged",
    example="llada-mega checkpoint verify runs/quickstart/checkpoints/step_00000060",
    options=CheckpointVerifyOptions,
    run=run,
    positional="path",
)
