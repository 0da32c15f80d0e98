"""Block-by-block denoising, from left to right (arXiv 2512.15745, inference; BD3-LM, arXiv 2503.09573).

Blocks count from position 0 of the sequence, as in training, so the first block with new tokens usually begins with the
end of the prompt. A finished block is never touched again: rows of later blocks see it, it does not see them. Every
step therefore computes the prefix anew and gets what a cache of finished blocks would give.

Legend: S tokens of prefix and current block, R masked positions of the block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada_mega.errors import CheckpointError, ConfigError
from llada_mega.inference.sampling import accept, draw_candidates, transfer_schedule

LogitsFunction = Callable[[Tensor, int, Tensor], Tensor]
"""(token ids int64 [S], block size, rows int64 [R]) -> logits [R, V] under the block-causal mask."""

StepCallback = Callable[["BlockState"], None]


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode.

    Attributes:
        max_new_tokens: length of the answer at most.
        block_size: tokens denoised together.
        steps: denoising steps a block at most; fewer when candidates pass the threshold.
        threshold: accept candidates that are more probable than this; 1 leaves the schedule alone.
        temperature: 0 takes the most probable token.
        top_p: share of the probability to sample from, in (0, 1].
        seed: of the sampling.
        stop_at_eos: stop after the block with the first EOS and cut the answer behind it.
    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    max_new_tokens: int = 128
    block_size: int = 32
    steps: int = 32
    threshold: float = 0.95
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_size", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.temperature < 0.0:
            raise ConfigError(f"temperature={self.temperature} must not be negative; 0 takes the most probable token")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1]; 1 samples from all tokens")
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold={self.threshold} is no probability; 0.95 is usual, 1 follows the schedule")


@dataclass(frozen=True)
class BlockState:
    """A block after a denoising step.

    Attributes:
        start: position of its first token in the sequence.
        tokens: its token ids, MASK where nothing is accepted yet.
        masked: which of them are still masked.
        accepted: which of them this step accepted.
        num_prompt: how many of them, from the left, belong to the prompt.
    """

    start: int
    tokens: list[int]
    masked: list[bool]
    accepted: list[bool]
    num_prompt: int


@dataclass(frozen=True)
class Generation:
    """What decoding gave.

    Attributes:
        token_ids: the answer without the prompt; its last token is EOS when ``finish_reason`` is "eos".
        forward_passes: calls of the model.
        finish_reason: "eos", or "length" when ``max_new_tokens`` ended it.
        states: the block under work after every denoising step.
    """

    token_ids: list[int]
    forward_passes: int
    finish_reason: str
    states: list[BlockState] = field(repr=False)

    @property
    def trace(self) -> list[list[int]]:
        """Token ids of the block after every denoising step, MASK where nothing was accepted yet."""
        return [state.tokens for state in self.states]

    @property
    def tokens_per_forward(self) -> float:
        """TPF: tokens of the answer over calls of the model."""
        return len(self.token_ids) / max(self.forward_passes, 1)


def decode(
    logits_function: LogitsFunction,
    prompt: Sequence[int],
    options: DecodingOptions,
    *,
    mask_token_id: int,
    eos_token_id: int | None = None,
    forbidden: Iterable[int] = (),
    on_step: StepCallback | None = None,
) -> Generation:
    """Generate an answer to ``prompt``.

    Args:
        logits_function: the model.
        prompt: token ids; may be empty.
        options: see :class:`DecodingOptions`.
        mask_token_id: fills what is not decided; never generated.
        eos_token_id: end of an answer; None: only the length ends it.
        forbidden: further ids that are never generated (rows of the vocabulary without a token).
        on_step: called after every denoising step.
    Raises:
        CheckpointError: the model's logits are not finite.
    """
    block_size, num_prompt = options.block_size, len(prompt)
    num_blocks = -(-(num_prompt + options.max_new_tokens) // block_size)
    tokens = torch.full((num_blocks * block_size,), mask_token_id, dtype=torch.int64)
    tokens[:num_prompt] = torch.tensor(prompt, dtype=torch.int64)
    masked = torch.arange(len(tokens)) >= num_prompt
    never = torch.tensor(sorted({mask_token_id, *forbidden}), dtype=torch.int64)
    states: list[BlockState] = []
    for start in range(num_prompt // block_size * block_size, len(tokens), block_size):
        block = slice(start, start + block_size)
        for step, scheduled in enumerate(transfer_schedule(block_size, options.steps)):
            position_R = masked[block].nonzero()[:, 0] + start
            if not len(position_R):
                break
            logits_RV = logits_function(tokens[: block.stop], block_size, position_R).float().cpu()
            if not bool(logits_RV.isfinite().all()):
                raise CheckpointError("the model's logits are not finite: its weights are damaged or have diverged")
            logits_RV = logits_RV.index_fill(1, never, -torch.inf)
            token_R, probability_R = draw_candidates(
                logits_RV,
                position_R,
                step=step,
                seed=options.seed,
                temperature=options.temperature,
                top_p=options.top_p,
            )
            keep_R = accept(probability_R, min(scheduled, len(position_R)), options.threshold)
            chosen = position_R[keep_R]
            tokens[chosen] = token_R[keep_R]
            masked[chosen] = False
            accepted = torch.zeros(block_size, dtype=torch.bool)
            accepted[chosen - start] = True
            states.append(
                BlockState(
                    start,
                    tokens[block].tolist(),
                    masked[block].tolist(),
                    accepted.tolist(),
                    max(0, min(block_size, num_prompt - start)),
                )
            )
            if on_step is not None:
                on_step(states[-1])
        if options.stop_at_eos and eos_token_id is not None and eos_token_id in tokens[num_prompt : block.stop]:
            break
    answer = tokens[num_prompt : min(block.stop, num_prompt + options.max_new_tokens)].tolist()
    if options.stop_at_eos and eos_token_id is not None and eos_token_id in answer:
        return Generation(answer[: answer.index(eos_token_id) + 1], len(states), "eos", states)
    return Generation(answer, len(states), "length", states)
