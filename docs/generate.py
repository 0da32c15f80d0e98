"""Writes ``docs/configuration.md`` and ``docs/commands.md`` from the sources (``make docs``)."""

from __future__ import annotations

import sys
from pathlib import Path

from llada_mega.commands import COMMANDS
from llada_mega.commands.base import default_text
from llada_mega.config.compose import config_groups
from llada_mega.config.reference import type_name, walk
from llada_mega.config.schema import Config

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- Written by `make docs`; edit the sources. -->"


def configuration() -> str:
    """Config groups and every key of ``llada-mega train``."""
    lines = ["# Configuration of `llada-mega train`", "", NOTE, ""]
    lines += [
        "Every key is an override: `llada-mega train experiment=NAME optimizer.lr=5e-5`. `checkpoint.async` is the"
    ]
    lines += [
        "name of `checkpoint.async_save` on the command line. `[]` stands for the number of a list's element.",
        "",
    ]
    lines += ["## Groups", "", "| group | choices |", "|---|---|"]
    lines += [
        f"| `{group}` | {', '.join(f'`{choice}`' for choice in choices)} |"
        for group, choices in config_groups().items()
    ]
    section = None
    for key in walk(Config):
        head = key.path.split(".")[0]
        if head != section:
            section = head
            lines += ["", f"## {head}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        if not key.is_section:
            meaning = key.comment.replace("|", "\\|")
            lines.append(f"| `{key.path}` | {type_name(key.type)} | `{default_text(key)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """``--help`` of every command; ``train`` and ``quickstart`` without their many keys."""
    lines = ["# Commands", "", NOTE, ""]
    for command in COMMANDS:
        text = command.help()
        if command.options is Config:
            text = text.partition("\nkeys:")[0] + "\nkeys: see configuration.md"
        lines += [f"## {command.name}", "", "```", *(line.rstrip() for line in text.splitlines()), "```", ""]
    return "\n".join(lines)


PAGES = {"configuration.md": configuration, "commands.md": commands}


def main() -> int:
    """Writes the pages and returns 0."""
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), "utf-8")
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
