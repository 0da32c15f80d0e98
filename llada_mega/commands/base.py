"""What every command is: a name, typed options, a check that costs nothing, and the work."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from llada_mega.config.compose import config_groups
from llada_mega.config.reference import Key, type_name, walk
from llada_mega.config.schema import Config
from llada_mega.errors import CheckpointError, ConfigError


def model_path(checkpoint: str | None, hf: str | None) -> Path:
    """The one model that ``checkpoint=`` or ``hf=`` names. Raises ConfigError when it is none, both or not there."""
    if (checkpoint is None) == (hf is None):
        raise ConfigError("give either checkpoint=PATH (a checkpoint or a run) or hf=DIR (a Hugging Face directory)")
    key, path = ("checkpoint", checkpoint) if checkpoint is not None else ("hf", str(hf))
    if not Path(path).exists():
        raise CheckpointError(f"{key}={path} does not exist; check the path")
    return Path(path)


def nothing_to_check(options: Any) -> None:
    """For commands whose options cannot contradict each other."""


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    ``options`` is the dataclass its keys come from; ``positional`` the key that one bare argument stands for, with
    ``many`` several of them as a list; ``presets`` overrides that hold unless the user gives the same key;
    ``distributed`` says that it runs as ``launch.nproc`` processes. ``check`` raises a LladaMegaError before
    anything slow is imported; ``run`` returns the exit status.
    """

    name: str
    summary: str
    example: str
    options: type
    run: Callable[[Any], int]
    check: Callable[[Any], None] = nothing_to_check
    positional: str | None = None
    many: bool = False
    presets: tuple[str, ...] = ()
    distributed: bool = False

    def help(self) -> str:
        """The text of ``--help``: usage, an example, config groups, and every key with type, default and meaning."""
        argument = f" [{self.positional.upper()}{' ...' if self.many else ''}]" if self.positional else ""
        lines = [
            f"usage: llada-mega {self.name}{argument} [key=value ...]",
            "",
            *textwrap.wrap(self.summary[0].upper() + self.summary[1:] + ".", 100),
            "",
            "example:",
            *(f"  {line}" for line in self.example.splitlines()),
        ]
        if issubclass(self.options, Config):
            lines += ["", "config groups (group=choice; your own files: hydra.searchpath=[file:///directory]):"]
            lines += [f"  {group}={' | '.join(choices)}" for group, choices in config_groups().items()]
        lines += ["", "keys:", *(line for key in walk(self.options) for line in _describe(key))]
        lines += [
            "",
            "flags: --help, --cfg job (print the composed configuration), --multirun (key=a,b runs every combination)",
        ]
        return "\n".join(lines)


def default_text(key: Key) -> str:
    """A key's default as one would type it; an ellipsis where there is none."""
    if key.default == MISSING:
        return "..."
    if isinstance(key.default, bool) or key.default is None:
        return {None: "null", True: "true", False: "false"}[key.default]
    return str(key.default) if key.default != "" else "''"


def _describe(key: Key) -> list[str]:
    if key.is_section:
        return []
    head = f"  {key.path}={default_text(key)}"
    note = f"{type_name(key.type)}. {key.comment}" if key.comment else type_name(key.type)
    return [f"{head:<44} {note}"]
