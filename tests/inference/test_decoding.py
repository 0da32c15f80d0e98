"""Block-by-block decoding against a decoder written from the description, with a dense mask and no shared code."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from llada_mega.errors import CheckpointError, ConfigError
from llada_mega.inference.decoding import BlockState, DecodingOptions, decode

VOCAB, MASK, EOS = 23, 22, 5


def visible(row: int, block_size: int, length: int) -> list[int]:
    """Positions that a row sees: everything up to the end of its own block, counted from position 0."""
    return [key for key in range(length) if key // block_size <= row // block_size]


def toy_logits(tokens: Tensor, block_size: int, rows: Tensor) -> Tensor:
    """A model whose logits hash all that a row may see, so that any wrong input shows."""
    result = []
    for row in rows.tolist():
        seen = [(key, int(tokens[key])) for key in visible(row, block_size, len(tokens))]
        generator = random.Random(str((row, seen)))
        result.append([generator.gauss(0.0, 4.0) for _ in range(VOCAB)])
    return torch.tensor(result)


def brute_force(
    prompt: list[int], length: int, block_size: int, steps: int, threshold: float
) -> tuple[list[int], list]:
    """Greedy decoding in lists and loops."""
    total = -(-(len(prompt) + length) // block_size) * block_size
    tokens = prompt + [MASK] * (total - len(prompt))
    open_positions = set(range(len(prompt), total))
    trace = []
    for block in range(len(prompt) // block_size, total // block_size):
        first, last = block * block_size, (block + 1) * block_size
        for step in range(steps):
            here = sorted(open_positions & set(range(first, last)))
            if not here:
                break
            wanted = block_size // steps + (1 if step < block_size % steps else 0)
            candidates = []
            logits = toy_logits(torch.tensor(tokens[:last]), block_size, torch.tensor(here))
            for position, row in zip(here, logits.tolist(), strict=True):
                row[MASK] = float("-inf")
                best = max(range(VOCAB), key=lambda token: row[token])
                exponentials = [2.718281828459045 ** (value - row[best]) for value in row]
                candidates.append((1.0 / sum(exponentials), position, best))
            chosen = [c for c in candidates if c[0] > threshold]
            if len(chosen) < wanted:
                chosen = sorted(candidates, reverse=True)[:wanted]
            for _, position, token in chosen:
                tokens[position] = token
                open_positions.discard(position)
            trace.append(tokens[first:last])
        if EOS in tokens[max(first, len(prompt)) : last]:
            break
    answer = tokens[len(prompt) : min(last, len(prompt) + length)]
    return (answer[: answer.index(EOS) + 1] if EOS in answer else answer), trace


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(("block_size", "steps"), [(1, 1), (4, 1), (4, 2), (4, 3), (4, 4), (8, 3), (8, 32)])
@pytest.mark.parametrize(("prompt_length", "length"), [(0, 8), (3, 13), (8, 5), (17, 1)])
def test_equals_brute_force(prompt_length: int, length: int, block_size: int, steps: int, threshold: float) -> None:
    prompt = [(7 * index + 1) % MASK for index in range(prompt_length)]
    options = DecodingOptions(length, block_size, steps, threshold)
    out = decode(toy_logits, prompt, options, mask_token_id=MASK, eos_token_id=EOS)
    token_ids, trace = brute_force(prompt, length, block_size, steps, threshold)
    assert out.token_ids == token_ids
    assert out.trace == trace
    assert out.forward_passes == len(trace)
    assert out.finish_reason == ("eos" if EOS in token_ids else "length")


def confident(target: list[int]) -> object:
    """A model that is sure of ``target`` wherever it is asked."""

    def logits(tokens: Tensor, block_size: int, rows: Tensor) -> Tensor:
        result = torch.zeros(len(rows), VOCAB)
        result[torch.arange(len(rows)), torch.tensor([target[row] for row in rows.tolist()])] = 50.0
        return result

    return logits


def test_threshold_finishes_a_confident_block_in_one_pass() -> None:
    target = [1, 2, 3, 4] * 4
    out = decode(confident(target), target[:2], DecodingOptions(14, 4, 4, 0.95), mask_token_id=MASK)
    assert out.token_ids == target[2:] and out.forward_passes == 4 and out.tokens_per_forward == 3.5
    slow = decode(confident(target), target[:2], DecodingOptions(14, 4, 4, 1.0), mask_token_id=MASK)
    assert slow.token_ids == target[2:] and slow.forward_passes == 14


def test_stops_behind_the_block_with_eos_and_cuts_there() -> None:
    target = [1, 2, 3, 4, 6, EOS, 7, 8, 9, 1, 2, 3]
    out = decode(confident(target), [1, 2], DecodingOptions(10, 4), mask_token_id=MASK, eos_token_id=EOS)
    assert (out.token_ids, out.finish_reason, out.forward_passes) == ([3, 4, 6, EOS], "eos", 2)
    on = decode(
        confident(target), [1, 2], DecodingOptions(10, 4, stop_at_eos=False), mask_token_id=MASK, eos_token_id=EOS
    )
    assert (on.token_ids, on.finish_reason) == (target[2:], "length")
    short = decode(confident(target), [1, 2], DecodingOptions(3, 4), mask_token_id=MASK, eos_token_id=EOS)
    assert (short.token_ids, short.finish_reason) == ([3, 4, 6], "length")


def test_eos_of_the_prompt_does_not_stop() -> None:
    target = [1, EOS, 3, 4, 6, 7, 8, 9]
    out = decode(confident(target), [1, EOS, 3], DecodingOptions(5, 4), mask_token_id=MASK, eos_token_id=EOS)
    assert out.token_ids == target[3:]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_mask_and_forbidden_tokens_never_come_out(temperature: float) -> None:
    def eager(tokens: Tensor, block_size: int, rows: Tensor) -> Tensor:
        logits = toy_logits(tokens, block_size, rows)
        logits[:, [MASK, 20, 21]] = 30.0
        return logits

    out = decode(
        eager,
        [1, 2, 3],
        DecodingOptions(61, 8, 4, 0.5, temperature, seed=4),
        mask_token_id=MASK,
        forbidden=range(20, VOCAB),
    )
    assert len(out.token_ids) == 61 and max(out.token_ids) < 20


def test_temperature_is_deterministic_by_seed() -> None:
    def run(seed: int) -> list[int]:
        options = DecodingOptions(40, 8, 4, 0.9, temperature=1.5, top_p=0.95, seed=seed)
        return decode(toy_logits, [1, 2, 3], options, mask_token_id=MASK).token_ids

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(4)}) == 4


def test_states_say_what_happened() -> None:
    seen: list[BlockState] = []
    out = decode(toy_logits, [1, 2, 3], DecodingOptions(9, 4, 2, 1.0), mask_token_id=MASK, on_step=seen.append)
    assert seen == out.states
    assert [state.start for state in out.states] == [0, 4, 4, 8, 8]
    assert [state.num_prompt for state in out.states] == [3, 0, 0, 0, 0]
    for state in out.states:
        assert [token == MASK for token in state.tokens] == state.masked
    assert [sum(state.accepted) for state in out.states] == [1, 2, 2, 2, 2]
    assert out.states[1].tokens != out.states[2].tokens and not any(out.states[2].masked)


def test_a_prompt_may_hold_mask_tokens() -> None:
    out = decode(toy_logits, [1, MASK, 3], DecodingOptions(5, 4, 1), mask_token_id=MASK)
    assert out.states[0].tokens[1] == MASK and out.states[0].masked == [False] * 4


def test_logits_that_are_not_finite_are_refused() -> None:
    def broken(tokens: Tensor, block_size: int, rows: Tensor) -> Tensor:
        return torch.full((len(rows), VOCAB), torch.nan)

    with pytest.raises(CheckpointError, match="not finite"):
        decode(broken, [1], DecodingOptions(4, 4), mask_token_id=MASK)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_new_tokens", 0), ("block_size", 0), ("steps", 0), ("temperature", -1.0)),
        *(("top_p", 0.0), ("top_p", 1.5), ("threshold", 1.01), ("threshold", -0.1)),
    ],
)
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        DecodingOptions(**{field: value})  # type: ignore[arg-type]
