"""The data of a run: opened and checked before anything slow, then turned into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llada_mega.config.schema import Config
from llada_mega.data.batch import Batch
from llada_mega.data.context import length_multiple, logit_row_multiple
from llada_mega.data.loader import BatchOptions, micro_batches
from llada_mega.data.order import RunCorpora
from llada_mega.data.sample import Sample
from llada_mega.data.tokenizer import load_tokenizer
from llada_mega.data.windows import validation_windows
from llada_mega.diffusion.curriculum import Curriculum
from llada_mega.errors import ConfigError, DataError


class TrainingData:
    """Corpora, held-out windows and micro-batches as the configuration names them.

    Raises:
        ConfigError, DataError: a corpus or tokenizer is missing, damaged, or does not fit the model.
    """

    def __init__(self, config: Config, curriculum: Curriculum) -> None:
        self.config = config
        mask_token_id = config.model.mask_token_id
        if mask_token_id is None:
            raise ConfigError("model.mask_token_id=null; training needs the id of the MASK token")
        tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise DataError(
                f"data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} tokens, the model has "
                f"model.vocab_size={config.model.vocab_size}; use the model's tokenizer"
            )
        self.corpora = RunCorpora(
            config.data, seed=config.seed, tokenizer=tokenizer, vocab_size=config.model.vocab_size
        )
        self.samples = self.corpora.training_samples(curriculum)
        pad = config.model.pad_token_id
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.options = BatchOptions(
            seed=config.seed,
            mask_token_id=mask_token_id,
            pad_token_id=pad if pad is not None else config.model.eos_token_id or 0,
            block_origin=config.data.block_origin,
            clean_tokens=config.data.clean_tokens,
            length_multiple=length_multiple(config.parallel, device),
            row_multiple=logit_row_multiple(config.parallel, device),
        )
        self.validation_samples = self._validation_samples() if config.trainer.validation.every else []

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Documents, tokens and a hash of each corpus that is trained on, by file name."""
        stages = (stage.data or [] for stage in self.config.curriculum.stages)
        paths = {corpus.path for corpora in (self.config.data.train, *stages) for corpus in corpora}
        return {Path(path).name: self.corpora.open(path).fingerprint() for path in sorted(paths)}

    def batches(self, start_sample: int, *, rank: int, world_size: int) -> Iterator[list[Batch]]:
        """This data-parallel rank's micro-batches from ``start_sample`` on, one list a step."""
        trainer = self.config.trainer
        return micro_batches(
            self.samples,
            self.options,
            start_sample=start_sample,
            global_batch_size=trainer.global_batch_size,
            micro_batch_size=trainer.micro_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.config.data.num_workers,
        )

    def _validation_samples(self) -> list[Sample]:
        """``validation.windows`` held-out windows, shared evenly by the held-out corpora."""
        held_out = self.corpora.held_out()
        if not held_out:
            raise ConfigError(
                "trainer.validation.every is set but nothing is held out; set data.valid or data.valid_fraction"
            )
        wanted = self.config.trainer.validation.windows
        windows: list[Sample] = []
        for index, (corpus, documents) in enumerate(held_out):
            count = (wanted * (index + 1)) // len(held_out) - (wanted * index) // len(held_out)
            windows += validation_windows(corpus, documents, self.config.data.sequence_length, count)
        return [replace(sample, sample_index=index) for index, sample in enumerate(windows)]
