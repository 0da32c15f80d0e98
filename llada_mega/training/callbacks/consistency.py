"""Stops a run in which ranks that share samples built different batches."""

from __future__ import annotations

import torch

from llada_mega.data.batch import Batch
from llada_mega.parallel.consistency import check_agreement, checksum
from llada_mega.training.callback import Callback
from llada_mega.training.trainer import Trainer


class ConsistencyCallback(Callback):
    """Compares checksums of the whole micro-batches, before context parallelism splits them.

    Runs at the first step of the process, also after a resume, and at every multiple of ``every``.
    """

    name = "consistency"

    def __init__(self, every: int) -> None:
        self._every = every
        self._is_first = True

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        step = trainer.state.step + 1
        if self._is_first or step % self._every == 0:
            self._is_first = False
            check_agreement(batch_checksums(batches), trainer.step.groups, step)


def batch_checksums(batches: list[Batch]) -> dict[str, int]:
    """Checksums of all that a step computes from, by the words that name it in a message."""
    shape = [torch.tensor([b.num_rows, b.denominator, b.num_tokens, b.block_size, b.consumed_samples]) for b in batches]
    return {
        "tokens": checksum(b.input_ids_S for b in batches),
        "positions": checksum(t for b in batches for t in (b.position_ids_S, b.padding_S)),
        "attention masks": checksum(b.mask.endpoints for b in batches),
        "masked tokens": checksum(t for b in batches for t in (b.logit_rows_R, b.labels_R)),
        "noise levels": checksum(t for b in batches for t in (b.noise_levels_R, b.weights_R)),
        "embedding noise": checksum(t for b in batches for t in (b.row_sample_R, b.row_position_R)),
        "sizes": checksum(shape),
    }
