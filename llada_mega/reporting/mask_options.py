"""What ``llada-mega mask`` is asked for. Imports nothing slow, so that a mistake is reported at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from llada_mega.errors import ConfigError

PICTURE_FORMATS = (".png", ".svg", ".pdf")
LAYOUTS = ("bdlm", "mdlm", "ar")
MAX_TOKENS = 1 << 20


@dataclass
class MaskOptions:
    """Keys of ``llada-mega mask``."""

    documents: list[int] = field(default_factory=lambda: [10, 6])  # lengths of the packed documents, in tokens
    block_size: int = 4  # tokens in a block
    layout: str = "bdlm"  # bdlm | mdlm | ar
    clean_tokens: str = "needed"  # needed | all: leave out clean tokens that no noisy token sees
    block_origin: str = "document"  # document | sequence: where blocks are counted from
    cp: int = 1  # context-parallel ranks
    output: Optional[str] = None  # picture to write: .png, .svg or .pdf; null: text only


def check_mask_options(options: MaskOptions) -> None:
    """Raises ConfigError, naming the key, when the options cannot be drawn."""
    if not options.documents or min(options.documents) < 1:
        raise ConfigError(f"documents={list(options.documents)}: give one positive length a document, such as [10,6]")
    total = sum(options.documents)
    if total > MAX_TOKENS:
        raise ConfigError(f"documents={list(options.documents)}: {total:,} tokens; at most {MAX_TOKENS:,} can be drawn")
    if options.block_size < 1:
        raise ConfigError(f"block_size={options.block_size} must be at least 1")
    for key, allowed in (
        ("layout", LAYOUTS),
        ("clean_tokens", ("needed", "all")),
        ("block_origin", ("document", "sequence")),
    ):
        value = getattr(options, key)
        if value not in allowed:
            raise ConfigError(f"{key}={value} is unknown; use {', '.join(allowed)}")
    if options.cp != 1:
        raise ConfigError(
            f"cp={options.cp}: which rank owns which rows cannot be drawn yet, context parallelism is still to come; "
            "use cp=1"
        )
    if options.output is not None:
        output = Path(options.output)
        if output.suffix.lower() not in PICTURE_FORMATS:
            raise ConfigError(f"output={options.output}: use a name that ends in {', '.join(PICTURE_FORMATS)}")
        if not output.parent.is_dir():
            raise ConfigError(f"output={options.output}: the directory {output.parent} does not exist; create it first")
