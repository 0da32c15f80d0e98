"""What show_steps draws."""

from __future__ import annotations

import io

from rich.console import Console

from llada_mega.inference.decoding import BlockState, Generation
from llada_mega.inference.render import MASK_SIGN, StepPrinter, render_state, token_text, trace_texts

STATES = [
    BlockState(0, [7, 9, 3, 3], [False, False, True, True], [False, True, False, False], 1),
    BlockState(0, [7, 9, 10, 8], [False] * 4, [False, False, True, True], 1),
]


def text_of(token_id: int) -> str:
    return {7: "Why", 8: " sky", 9: " is", 10: "\n"}.get(token_id, "?")


def test_masked_positions_are_dim_and_new_tokens_bright() -> None:
    text = render_state(STATES[0], text_of)
    assert text.plain == f"Why is{MASK_SIGN}{MASK_SIGN}"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert "bright" in styles[" is"] and styles[MASK_SIGN] == "dim" and "italic" in styles["Why"]
    assert render_state(STATES[1], text_of).plain == "Why is⏎ sky"


def test_without_a_terminal_every_step_is_a_line() -> None:
    file = io.StringIO()
    with StepPrinter(None, Console(file=file, width=80)) as printer:
        for state in STATES:
            printer(state)
    assert file.getvalue().splitlines() == [f"   1   7 9{MASK_SIGN}{MASK_SIGN}", "   2   7 9 10 8"]


def test_in_a_terminal_finished_blocks_stay() -> None:
    file = io.StringIO()
    with StepPrinter(None, Console(file=file, width=80, force_terminal=True)) as printer:
        for state in STATES:
            printer(state)
    assert " 10" in file.getvalue() and MASK_SIGN in file.getvalue()


def test_trace_as_texts() -> None:
    generation = Generation([9, 10, 8], 2, "length", STATES)
    assert trace_texts(generation, None) == [[" 7", " 9", None, None], [" 7", " 9", " 10", " 8"]]
    assert token_text(None)(4) == " 4"
