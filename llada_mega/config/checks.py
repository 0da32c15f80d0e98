"""Refusals of one line: the key, its value, and values that work."""

from __future__ import annotations

from collections.abc import Sequence

from llada_mega.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def words(values: Sequence[object]) -> str:
    """``1, 2 or 4``."""
    head, last = [str(value) for value in values[:-1]], str(values[-1])
    return f"{', '.join(head)} or {last}" if head else last


def one_of(key: str, value: object, choices: Sequence[object]) -> None:
    """``value`` is one of ``choices``."""
    require(value in choices, f"{key}={value} is not a choice; use {words(choices)}")


def at_least(minimum: float, **values: float | None) -> None:
    """Each ``section__key=value`` (None passes) is at least ``minimum``."""
    for name, value in values.items():
        key = name.replace("__", ".")
        require(value is None or value >= minimum, f"{key}={value} is too small; use {minimum} or more")


def divisors(number: int) -> list[int]:
    """Divisors in order; only the powers of two among them where there are more than 12."""
    found = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    return found if len(found) <= 12 else [candidate for candidate in found if candidate & (candidate - 1) == 0]


def divides(key: str, value: int, other_key: str, other: int) -> None:
    """``value`` divides ``other``."""
    require(other % value == 0, f"{key}={value} does not divide {other_key}={other}; use {words(divisors(other))}")
