"""``llada-mega mask``: draws an attention mask."""

from __future__ import annotations

from llada_mega.commands.base import Command
from llada_mega.reporting.mask_options import MaskOptions, check_mask_options


def run(options: MaskOptions) -> int:
    """Prints the mask and writes the picture."""
    from llada_mega.reporting.mask_drawing import draw_mask

    draw_mask(options)
    return 0


COMMAND = Command(
    name="mask",
    summary="draw who sees whom: the mask, its intervals and its live area, as text and as a picture",
    example="llada-mega mask documents=[10,6] block_size=4\n"
    "llada-mega mask documents=[400,112] block_size=32 output=mask.png",
    options=MaskOptions,
    run=run,
    check=check_mask_options,
)
