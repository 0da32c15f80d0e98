"""Which activations a pipeline stage holds at once, from the order in which Megatron-Core's schedules work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice


@dataclass(frozen=True)
class State:
    """A moment right before a backward pass: passes held of each chunk of the stage, and the chunk that goes back."""

    held: tuple[int, ...]
    going_back: int


@cache
def states(pp: int, chunks: int, stage: int, num_micro_batches: int) -> tuple[State, ...]:
    """The states of a step on pipeline rank ``stage``, without those that hold no more of any chunk than another one.

    A stage goes forward a number of times, then forward and backward in turn, then backward. With several chunks it
    takes ``pp`` micro-batches through one chunk before it goes on to the next, backward in the opposite order.
    """
    # A schedule repeats itself after pp x chunks passes; more micro-batches add no state.
    rounds = min(num_micro_batches, 4 * pp)
    total = rounds * chunks
    behind = pp - stage - 1
    warm_up = min(behind if chunks == 1 else 2 * behind + (chunks - 1) * pp, total)
    group = pp if chunks > 1 else 1
    forward = islice(_order(group, chunks), total)
    held = [0] * chunks
    for _ in range(warm_up):
        held[next(forward)] += 1
    found: dict[State, None] = {}
    for chunk in islice(_order(group, chunks), total):
        entering = next(forward, None)
        if entering is not None:
            held[entering] += 1
        back = chunks - 1 - chunk
        found[State(tuple(held), back)] = None
        held[back] -= 1
    return tuple(state for state in found if not any(_holds_more(other, state) for other in found))


def _holds_more(one: State, other: State) -> bool:
    same_work = one.going_back == other.going_back and one != other
    return same_work and all(a >= b for a, b in zip(one.held, other.held, strict=True))


def _order(group: int, chunks: int) -> Iterator[int]:
    """Chunk of each forward pass."""
    return (number // group % chunks for number in count())
