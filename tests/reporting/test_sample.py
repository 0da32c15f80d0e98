"""sample.json: blocks found in the snapshots, who was filled when, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llada_mega.errors import DataError
from llada_mega.reporting.sample import parse_sample, split_blocks, write_sample
from tests.reporting.fake_run import sample


def test_blocks_are_split_after_a_complete_snapshot() -> None:
    steps = [[None, None], ["a", None], ["a", "b"], ["c", None], ["c", "d"], ["e"]]
    blocks = split_blocks(steps)
    assert [block.tokens for block in blocks] == [("a", "b"), ("c", "d"), ("e",)]
    assert [block.step_numbers() for block in blocks] == [[0, 1, 2], [1, 2], [1]]
    assert blocks[0].revealed_at() == [1, 2]


def test_positions_that_stay_masked_or_change() -> None:
    (block,) = split_blocks([[None, None, None], ["a", "x", None], ["a", "y", None]])
    assert block.revealed_at() == [1, 2, None]
    assert [fresh for _, fresh in block.changes()] == [[False] * 3, [True, True, False], [False, True, False]]


def test_the_prompts_end_in_the_first_block_is_not_generated() -> None:
    content = {"prompt": "to be", "text": " or", "block_size": 2, "prompt_tokens": 1,
               "steps": [[" be", None], [" be", " or"], [None, None], [" not", " to"]]}  # fmt: skip
    parsed = parse_sample(content, "sample.json")
    assert parsed.num_tokens == 3
    assert parsed.num_steps == 2
    first, second = parsed.blocks
    assert first.revealed_at() == [0, 1]
    assert [fresh for _, fresh in first.changes()] == [[False, False], [False, True]]
    assert second.revealed_at() == [1, 1]


def test_written_and_read_back(tmp_path: Path) -> None:
    content = sample()
    path = write_sample(
        tmp_path, prompt=content["prompt"], text=content["text"], block_size=8, steps=content["steps"], seed=3
    )
    parsed = parse_sample(json.loads(path.read_text(encoding="utf-8")), path.name)
    assert "".join(token or "" for block in parsed.blocks for token in block.tokens) == content["text"]
    assert parsed.block_size == 8
    assert parsed.facts == {"seed": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object"),
        ({"steps": "abc"}, "steps must be a list"),
        ({"steps": [["a", 3]]}, "steps must be a list"),
        ({"steps": [], "block_size": "8"}, "block_size='8'"),
        ({"steps": [], "prompt_tokens": -1}, "prompt_tokens=-1"),
    ],
)
def test_other_contents_are_refused(content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_sample(content, "sample.json")
