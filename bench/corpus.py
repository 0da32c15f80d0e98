"""A corpus that every machine has: Python's own documentation, and a small tokenizer trained on it.

Nothing is downloaded, and the vocabulary is small, so that a tiny model spends its time in its layers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llada_mega.data.build import build_corpus
from llada_mega.data.text import python_prose, write_jsonl

VOCAB_SIZE = 2048
EOS, MASK = "<eos>", "<mask>"  # ids 0 and 1
# What `llada-mega train` has to know of it, beside the corpus itself.
MODEL_OVERRIDES = (
    f"model.vocab_size={VOCAB_SIZE}",
    "model.mask_token_id=1",
    "model.bos_token_id=null",
    "model.eos_token_id=0",
    "model.pad_token_id=0",
)


def prepare_corpus(directory: Path) -> tuple[str, ...]:
    """Make tokenizer and corpus below ``directory`` unless they are there; the overrides that train on them."""
    tokenizer, prefix = directory / "tokenizer", directory / "prose"
    if not prefix.with_suffix(".idx").exists():
        tokenizer.mkdir(parents=True, exist_ok=True)
        _train_tokenizer(tokenizer)
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "prose.jsonl"
            write_jsonl(source, python_prose())
            build_corpus([source], str(tokenizer), prefix, progress=False)
    return (f"data.train=[{{path: {prefix}, weight: 1}}]", f"data.tokenizer={tokenizer}", *MODEL_OVERRIDES)


def _train_tokenizer(directory: Path) -> None:
    """Byte-level BPE of ``VOCAB_SIZE`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in python_prose()), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "mask_token": MASK}))
