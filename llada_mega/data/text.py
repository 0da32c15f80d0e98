"""Real text that every Python ships, for runs that must not download anything.

Prose is the language reference in ``pydoc_data.topics``; sources are the standard library's own files.
"""

from __future__ import annotations

import json
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics

Document = tuple[str, str]  # name, text

_PROSE_HELD_OUT = 0.2  # of all characters, at most
_SOURCES_HELD_OUT = 0.05  # of all files
_LONG_PARAGRAPH = 80  # characters; a shorter one may stand in two topics by chance
# Not libraries to learn from: tests, generated tables, other people's packages, and the prose itself.
_SKIPPED_SOURCES = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "pydoc_data",
}
_SKIPPED_PREFIXES = ("__pycache__", "_sysconfigdata", "config-")


def python_prose(held_out: bool | None = None) -> Iterator[Document]:
    """Topics of Python's reference documentation, one document each, in alphabetical order.

    Topics overlap: ``compound`` repeats ``if``, ``for`` and ``while``. A topic whose long paragraphs all stand in
    another one is left out, and topics that share one fall on the same side of the split, so held-out text was not
    trained on under another name.

    Args:
        held_out: True for the held-out fifth, False for the rest, None for all. The split follows from the names.
    """
    paragraphs = {name: _paragraphs(text) for name, text in topics.items()}
    names = _without_copies(paragraphs)
    groups = _connected({name: paragraphs[name] for name in names})
    hidden = _held_out_names(groups)
    for name in names:
        if held_out is None or held_out == (name in hidden):
            yield name, topics[name].strip() + "\n"


def python_sources(held_out: bool | None = None) -> Iterator[Document]:
    """Modules of the standard library, one document a file, in alphabetical order; ``held_out`` as above (5 %)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED_SOURCES or part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        name = "/".join(parts)
        if held_out is not None and held_out != (_rank(name) < _SOURCES_HELD_OUT):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield name, text


def write_jsonl(path: Path, documents: Iterable[Document]) -> int:
    """Write ``{"name": ..., "text": ...}`` lines, as ``data build`` reads them; returns the number of documents."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for name, text in documents:
            file.write(json.dumps({"name": name, "text": text}) + "\n")
            count += 1
    return count


def _paragraphs(text: str) -> set[str]:
    """Long paragraphs of a topic with white space normalised: titles and indentation differ between copies."""
    normalised = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in normalised if len(paragraph) >= _LONG_PARAGRAPH}


def _without_copies(paragraphs: dict[str, set[str]]) -> list[str]:
    """Names whose long paragraphs are not all in one other topic; of equal topics the first name stays."""

    def is_copy(name: str, other: str) -> bool:
        mine, theirs = paragraphs[name], paragraphs[other]
        return bool(mine) and (mine < theirs or (mine == theirs and other < name))

    return [name for name in sorted(paragraphs) if not any(is_copy(name, other) for other in paragraphs)]


def _connected(paragraphs: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that are linked by paragraphs that they share."""
    group_of = {name: {name} for name in paragraphs}
    holders = defaultdict(list)
    for name, texts in paragraphs.items():
        for text in texts:
            holders[text].append(name)
    for first, *others in holders.values():
        for other in others:
            if group_of[other] is not group_of[first]:
                group_of[first] |= group_of[other]
                for name in group_of[other]:
                    group_of[name] = group_of[first]
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]


def _held_out_names(groups: list[list[str]]) -> set[str]:
    """Whole groups in the order of a hash of their first name, as long as they fit the held-out share."""
    room = _PROSE_HELD_OUT * sum(len(topics[name]) for group in groups for name in group)
    chosen: set[str] = set()
    for group in sorted(groups, key=lambda group: _rank(group[0])):
        size = sum(len(topics[name]) for name in group)
        if size <= room:
            room -= size
            chosen.update(group)
    return chosen


def _rank(name: str) -> float:
    """A fixed number in [0, 1) for a name."""
    return int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64
