"""What a run reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


@dataclass
class Corpus:
    """One indexed dataset (``path``.bin/.idx) and its share of the blend (any positive number)."""

    path: str = ""
    weight: float = 1.0


@dataclass
class DataConfig:
    """Corpora, packing and clean-token policy. Lengths are tokens."""

    sequence_length: int = 128
    train: list[Corpus] = field(default_factory=list)
    valid: list[Corpus] = field(default_factory=list)
    valid_fraction: float = 0.0  # share of train documents held out when ``valid`` is empty (0 to 0.5)
    tokenizer: Optional[str] = None  # directory with tokenizer.json; checked against the corpora and the model
    document_alignment: int = 32
    block_origin: str = "document"  # document | sequence
    clean_tokens: str = "needed"  # needed | all
    num_workers: int = 0
