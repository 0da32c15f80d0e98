"""Shows denoising in the terminal: masked positions dim, newly accepted tokens bright."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llada_mega.data.tokenizer import Tokenizer
from llada_mega.inference.decoding import BlockState, Generation

MASK_SIGN = "░"

TokenText = Callable[[int], str]


def token_text(tokenizer: Tokenizer | None) -> TokenText:
    """Text of one token id; without a tokenizer, its number."""
    if tokenizer is None:
        return lambda token_id: f" {token_id}"
    return lambda token_id: tokenizer.decode([token_id])


def render_state(state: BlockState, text_of: TokenText) -> Text:
    """The block: prompt plain, masked dim, accepted in this step bright, accepted earlier normal."""
    text = Text()
    for index, token_id in enumerate(state.tokens):
        if state.masked[index]:
            text.append(MASK_SIGN, style="dim")
        elif state.accepted[index]:
            text.append(_visible(text_of(token_id)), style="bold bright_green")
        else:
            text.append(_visible(text_of(token_id)), style="dim italic" if index < state.num_prompt else "")
    return text


def trace_texts(generation: Generation, tokenizer: Tokenizer | None) -> list[list[str | None]]:
    """The trace as text: one list a denoising step, None where a position was still masked."""
    text_of = token_text(tokenizer)
    return [
        [None if hidden else text_of(token_id) for token_id, hidden in zip(state.tokens, state.masked, strict=True)]
        for state in generation.states
    ]


class StepPrinter:
    """A step callback. In a terminal the current block is redrawn in place; elsewhere every step is a line.

    Use it as a context manager around ``generate(..., on_step=printer)``.
    """

    def __init__(self, tokenizer: Tokenizer | None, console: Console | None = None) -> None:
        self.text_of = token_text(tokenizer)
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._steps = 0

    def __enter__(self) -> StepPrinter:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, state: BlockState) -> None:
        """Show one step."""
        self._steps += 1
        line = Text(f"{self._steps:>4}  ", style="dim").append_text(render_state(state, self.text_of))
        if self._live is None:
            self.console.print(line)
        elif any(state.masked):
            self._live.update(line, refresh=True)
        else:  # the finished block stays on the screen, the next one is drawn below it
            self.console.print(line)
            self._live.update(Text(), refresh=True)


def _visible(text: str) -> str:
    return text.replace("\r", "").replace("\n", "⏎")
