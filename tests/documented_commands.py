"""The commands that the documentation shows: every line of its shell blocks, taken apart."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = (
    *("llada-mega", "make", "git", "python", "python3", "pip", "uv", "docker", "bash", "torchrun", "kubectl"),
    *("sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "launch/torchrun.sh", ".venv/bin/python"),
)
SHELL_LANGUAGES = ("", "bash", "sh", "shell", "console")
_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^>]*?) -->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Documented:
    """One command.

    Attributes:
        page: file that shows it.
        block: which of the page's blocks, from 0.
        words: as a shell would split it, without variables in front and without a comment at the end.
        needs: what it is marked to need that a test does not have; None when it is not marked.
    """

    page: str
    block: int
    words: tuple[str, ...]
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands_of(page: str, text: str) -> list[Documented]:
    """The commands of a page.

    A block without a language that starts no known program is output, and left out. Marks are a comment
    ``<!-- needs: gpu -->`` above the block, or the words ``needs ...`` in the comment behind a command.

    Raises:
        ValueError: a line of a shell block starts no known program.
    """
    found = []
    for number, block in enumerate(_BLOCK.finditer(text)):
        if block["language"] not in SHELL_LANGUAGES:
            continue
        lines = block["body"].replace("\\\n", " ").splitlines()
        split = [(line, _words(line)) for line in lines if _words(line)]
        if not block["language"] and not any(words[0] in PROGRAMS for _, words in split):
            continue
        for line, words in split:
            if words[0] not in PROGRAMS:
                raise ValueError(f"{page}: {line.strip()!r} starts none of {', '.join(PROGRAMS)}")
            mark = re.search(r"\s#.*\bneeds (.+)$", line)
            found.append(Documented(page, number, tuple(words), block["needs"] or (mark[1] if mark else None)))
    return found


def documented_commands() -> list[Documented]:
    """The commands of all pages, in order; ``docs/commands.md`` is what the commands themselves print."""
    return [
        command
        for page in PAGES
        if page.name != "commands.md"
        for command in commands_of(str(page.relative_to(ROOT)), page.read_text("utf-8"))
    ]


def _words(line: str) -> list[str]:
    command = re.sub(r"(^|\s)#\s.*", "", line.strip().removeprefix("$ "))
    try:
        words = shlex.split(command)
    except ValueError:  # prose with an apostrophe
        words = command.split()
    while words and _ASSIGNMENT.match(words[0]):
        del words[0]
    return words
