"""``RUN/sample.json``: one generated text and how its blocks were denoised.

The file is an object::

    {"prompt": "Why ", "text": "is the sky blue?", "block_size": 4,
     "steps": [[null, null, null, null], ["is", null, null, null], ["is", " the", " sky", " blue"], [null], ["?"]],
     "prompt_tokens": 0, "forward_passes": 3}

``steps`` holds the state of the block under work after every denoising step, in order: one entry a position, the
token's text, or null while it is masked. Blocks are not marked: a snapshot starts the next block when the one before
it had no mask left. A snapshot with every position masked (the start of a block) is allowed and not needed.
``prompt_tokens`` (default 0) is the number of positions at the start of the first block that are the end of the prompt.
Any other key (``forward_passes``, ``threshold``, ``temperature``, ``seed``) is shown as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada_mega.errors import DataError

SAMPLE_FILE = "sample.json"
Snapshot = tuple[str | None, ...]


@dataclass(frozen=True)
class TracedBlock:
    """One block: its snapshots, oldest first, all of the same length; the first ``given`` positions are prompt."""

    snapshots: tuple[Snapshot, ...]
    given: int = 0

    @property
    def tokens(self) -> Snapshot:
        """The block's tokens in the last snapshot; None where a position was never filled."""
        return self.snapshots[-1]

    def revealed_at(self) -> list[int | None]:
        """Per position, the 1-based denoising step that filled it last (0: prompt, None: still masked at the end)."""
        revealed: list[int | None] = [0] * self.given + [None] * (len(self.tokens) - self.given)
        for number, (snapshot, fresh) in zip(self.step_numbers(), self.changes(), strict=True):
            for position in range(self.given, len(snapshot)):
                if snapshot[position] is None:
                    revealed[position] = None
                elif fresh[position]:
                    revealed[position] = number
        return revealed

    def step_numbers(self) -> list[int]:
        """The 1-based denoising step after which each snapshot was taken; 0 for the start, everything masked."""
        first = self.snapshots[0][self.given :]
        start = 0 if first and all(token is None for token in first) else 1
        return list(range(start, start + len(self.snapshots)))

    def changes(self) -> Iterator[tuple[Snapshot, list[bool]]]:
        """Each snapshot with, per position, whether it was filled since the snapshot before."""
        previous: Snapshot = self.snapshots[0][: self.given] + (None,) * (len(self.tokens) - self.given)
        for snapshot in self.snapshots:
            yield snapshot, [now is not None and now != then for now, then in zip(snapshot, previous, strict=True)]
            previous = snapshot


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
        """Generated positions over all blocks, those that stayed masked included."""
        return sum(len(block.tokens) - block.given for block in self.blocks)

    @property
    def num_steps(self) -> int:
        """Denoising steps over all blocks."""
        return sum(block.step_numbers()[-1] for block in self.blocks)


def split_blocks(steps: Sequence[Sequence[str | None]], prompt_tokens: int = 0) -> tuple[TracedBlock, ...]:
    """Group snapshots into blocks: after a complete snapshot, or with another length, the next block begins."""
    blocks: list[list[Snapshot]] = []
    for step in steps:
        snapshot = tuple(step)
        if not snapshot:
            continue
        last = blocks[-1][-1] if blocks else None
        if last is None or len(last) != len(snapshot) or None not in last:
            blocks.append([])
        blocks[-1].append(snapshot)
    return tuple(
        TracedBlock(tuple(snapshots), min(prompt_tokens, len(snapshots[0])) if number == 0 else 0)
        for number, snapshots in enumerate(blocks)
    )


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
    prompt_tokens = content.get("prompt_tokens", 0)
    for key, value in (("block_size", block_size), ("prompt_tokens", prompt_tokens)):
        if not isinstance(value, int) or value < 0:
            raise DataError(f"{source}: {key}={value!r} must be a whole number of tokens")
    known = {"prompt", "text", "block_size", "steps", "prompt_tokens"}
    return GeneratedSample(
        prompt=str(content.get("prompt", "")),
        text=str(content.get("text", "")),
        block_size=block_size,
        blocks=split_blocks(steps, prompt_tokens),
        facts={str(key): value for key, value in content.items() if key not in known},
    )


def write_sample(
    run_dir: Path,
    *,
    prompt: str,
    text: str,
    block_size: int,
    steps: Sequence[Sequence[str | None]],
    prompt_tokens: int = 0,
    **facts: Any,
) -> Path:
    """Write ``run_dir/sample.json``; the report shows it. ``facts`` are JSON values such as ``forward_passes=24``."""
    content = {
        "prompt": prompt,
        "text": text,
        "block_size": block_size,
        "steps": [list(step) for step in steps],
        "prompt_tokens": prompt_tokens,
        **facts,
    }
    path = run_dir / SAMPLE_FILE
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path
