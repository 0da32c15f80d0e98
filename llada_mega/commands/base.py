"""What every command is: a name, typed options, a check that costs nothing, and the work."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llada_mega.config.compose import config_groups
from llada_mega.config.reference import Key, type_name, walk
from llada_mega.config.schema import Config


def nothing_to_check(options: Any) -> None:
    """For commands whose options cannot contradict each other."""


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    ``options`` is the dataclass its keys come from; ``positional`` the key that one bare argument stands for;
    ``presets`` overrides that hold unless the user gives the same key. ``check`` raises a LladaMegaError before
    anything slow is imported; ``run`` returns the exit status.
    """

    name: str
    summary: str
    example: str
    options: type
    run: Callable[[Any], int]
    check: Callable[[Any], None] = nothing_to_check
    positional: str | None = None
    presets: tuple[str, ...] = ()

    def help(self) -> str:
        """The text of ``--help``: usage, an example, config groups, and every key with type, default and meaning."""
        argument = f" [{self.positional.upper()}]" if self.positional else ""
        lines = [
            f"usage: llada-mega {self.name}{argument} [key=value ...]",
            "",
            *textwrap.wrap(self.summary[0].upper() + self.summary[1:] + ".", 100),
            "",
            "example:",
            *(f"  {line}" for line in self.example.splitlines()),
        ]
        if self.options is Config:
            lines += ["", "config groups (group=choice; your own files: hydra.searchpath=[file:///directory]):"]
            lines += [f"  {group}={' | '.join(choices)}" for group, choices in config_groups().items()]
        lines += ["", "keys:", *(line for key in walk(self.options) for line in _describe(key))]
        lines += [
            "",
            "flags: --help, --cfg job (print the composed configuration), --multirun (key=a,b runs every combination)",
        ]
        return "\n".join(lines)


def default_text(key: Key) -> str:
    """A key's default as one would type it."""
    if isinstance(key.default, bool) or key.default is None:
        return {None: "null", True: "true", False: "false"}[key.default]
    return str(key.default) if key.default != "" else "''"


def _describe(key: Key) -> list[str]:
    if key.is_section:
        return []
    head = f"  {key.path}={default_text(key)}"
    note = f"{type_name(key.type)}. {key.comment}" if key.comment else type_name(key.type)
    return [f"{head:<44} {note}"]
