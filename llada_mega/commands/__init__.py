"""The commands of the command line, one module each. They hold options and call the library; they compute nothing."""

from __future__ import annotations

from llada_mega.commands import train
from llada_mega.commands.base import Command

COMMANDS: tuple[Command, ...] = (train.COMMAND,)
