"""``RUN/sample.json``: one generated text and how its blocks were denoised.

The file is an object::

    {"prompt": "Why ", "text": "is the sky blue?", "block_size": 4,
     "steps": [[null, null, null, null], ["is", null, null, null], ["is", " the", " sky", " blue"], [null], ["?"]],
     "forward_passes": 3}

``steps`` holds the state of the block under work after every denoising step, in order: one entry a position, the
token's text, or null while it is masked. Blocks are not marked: a snapshot starts the next block when the one before
it had no mask left. A snapshot with every position masked (the start of a block) is allowed and not needed. Any other
key (``forward_passes``, ``threshold``, ``temperature``, ``seed``) is shown as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada_mega.errors import DataError

SAMPLE_FILE = "sample.json"
Snapshot = tuple[str | None, ...]


@dataclass(frozen=True)
class TracedBlock:
    """One block: its snapshots, oldest first, all of the same length."""

    snapshots: tuple[Snapshot, ...]

    @property
    def tokens(self) -> Snapshot:
        """The block's tokens in the last snapshot; None where a position was never filled."""
        return self.snapshots[-1]

    def revealed_at(self) -> list[int | None]:
        """Per position, the 1-based denoising step that filled it last (None: still masked at the end).

        Snapshots with every position masked are the start, not a step, and are not counted.
        """
        steps = [snapshot for snapshot in self.snapshots if any(token is not None for token in snapshot)]
        revealed: list[int | None] = [None] * len(self.tokens)
        previous: Snapshot = (None,) * len(self.tokens)
        for number, snapshot in enumerate(steps, start=1):
            for position, token in enumerate(snapshot):
                if token is None:
                    revealed[position] = None
                elif token != previous[position]:
                    revealed[position] = number
            previous = snapshot
        return revealed


@dataclass(frozen=True)
class GeneratedSample:
    """A prompt, the text that was generated after it, and the denoising of its blocks."""

    prompt: str
    text: str
    block_size: int
    blocks: tuple[TracedBlock, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Positions over all blocks, those that stayed masked included."""
        return sum(len(block.tokens) for block in self.blocks)

    @property
    def num_steps(self) -> int:
        """Denoising steps over all blocks: the forward passes that filled at least one position."""
        return sum(max((step for step in block.revealed_at() if step), default=0) for block in self.blocks)


def split_blocks(steps: Sequence[Sequence[str | None]]) -> tuple[TracedBlock, ...]:
    """Group snapshots into blocks: a complete snapshot, or one of another length, ends the block before it."""
    blocks: list[list[Snapshot]] = []
    for step in steps:
        snapshot = tuple(step)
        if not snapshot:
            continue
        last = blocks[-1][-1] if blocks else None
        if last is None or len(last) != len(snapshot) or None not in last:
            blocks.append([])
        blocks[-1].append(snapshot)
    return tuple(TracedBlock(tuple(snapshots)) for snapshots in blocks)


def parse_sample(content: Any, source: str) -> GeneratedSample:
    """Check the object described on top of this module. Raises DataError, naming ``source``, when it is another."""
    if not isinstance(content, Mapping):
        raise DataError(f"{source}: expected an object with prompt, text, block_size and steps")
    steps = content.get("steps", [])
    well_formed = isinstance(steps, list) and all(
        isinstance(step, list) and all(token is None or isinstance(token, str) for token in step) for step in steps
    )
    if not well_formed:
        raise DataError(f"{source}: steps must be a list of lists of token strings, null where masked")
    block_size = content.get("block_size", max((len(step) for step in steps), default=0))
    if not isinstance(block_size, int):
        raise DataError(f"{source}: block_size={block_size!r} must be a whole number of tokens")
    known = {"prompt", "text", "block_size", "steps"}
    return GeneratedSample(
        prompt=str(content.get("prompt", "")),
        text=str(content.get("text", "")),
        block_size=block_size,
        blocks=split_blocks(steps),
        facts={str(key): value for key, value in content.items() if key not in known},
    )


def write_sample(
    run_dir: Path,
    *,
    prompt: str,
    text: str,
    block_size: int,
    steps: Sequence[Sequence[str | None]],
    **facts: Any,
) -> Path:
    """Write ``run_dir/sample.json``; the report shows it. ``facts`` are JSON values such as ``forward_passes=24``."""
    content = {
        "prompt": prompt,
        "text": text,
        "block_size": block_size,
        "steps": [list(step) for step in steps],
        **facts,
    }
    path = run_dir / SAMPLE_FILE
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path
