"""From a batch to the cross entropy of its predicted rows, whoever runs the model.

Legend: S positions, B batch (1), H hidden size, R predicted rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.data.batch import Batch
from llada_mega.data.context import attention_tile, length_multiple, logit_row_multiple, shard_batch
from llada_mega.inference.model import LoadedModel
from llada_mega.models import BlockDiffusionModel, RowLosses, run_batch


class RowScores(NamedTuple):
    """Cross entropy in nats (float [R]) and whether the most probable token is the label (bool [R])."""

    cross_entropy_R: Tensor
    correct_R: Tensor


class Scorer(Protocol):
    """Runs the model on a batch. Ranks that hold parts of one model call it together with the same batch."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        ...

    @property
    def length_multiple(self) -> int:
        """What the positions of a batch must be a multiple of."""
        ...

    @property
    def row_multiple(self) -> int:
        """What the logit rows of a batch must be a multiple of."""
        ...

    def part(self, batch: Batch) -> Batch:
        """The part of a whole batch that this process scores."""
        ...

    def score(self, batch: Batch) -> RowScores | None:
        """Scores of the real rows (``num_rows``) of a :meth:`part`, without embedding noise and without gradients.

        None where another process of the same model has them.
        """
        ...


class ModelScorer:
    """A model in training or alone, under any parallel layout.

    Pipeline stages pass hidden states on without Megatron's schedules: a stage goes on to the next batch while later
    stages work on this one.

    Args:
        chunks: this rank's model, or its chunks under virtual pipeline parallelism.
    """

    def __init__(self, *chunks: BlockDiffusionModel) -> None:
        self.chunks, self.groups = chunks, chunks[0].groups
        self.device = next(chunks[0].parameters()).device

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.chunks[0].model_config

    @property
    def length_multiple(self) -> int:
        """See :class:`Scorer`."""
        return length_multiple(self.groups.config, self.device)

    @property
    def row_multiple(self) -> int:
        """See :class:`Scorer`."""
        return logit_row_multiple(self.groups.config, self.device)

    def part(self, batch: Batch) -> Batch:
        """See :class:`Scorer`."""
        context = self.groups.cp
        tile = attention_tile(self.device)
        return shard_batch(batch, context.rank(), context.size(), work_tile=tile, row_multiple=self.row_multiple)

    @torch.no_grad()
    def score(self, batch: Batch) -> RowScores | None:
        """See :class:`Scorer`. The model's training mode is put back."""
        batch = batch.to(self.device)
        output: Tensor | RowLosses | None = None
        with _evaluating(self.chunks):
            for chunk in self.chunks:
                if not chunk.pre_process:
                    chunk.set_input_tensor(self._receive(chunk, batch))
                output = run_batch(chunk, batch)
                if isinstance(output, Tensor):
                    dist.send(output, group=self.groups.pp, group_dst=self._stage(1))
        if not isinstance(output, RowLosses):
            return None
        return RowScores(output.cross_entropy_R[: batch.num_rows], output.correct_R[: batch.num_rows])

    def _stage(self, step: int) -> int:
        """Rank in the pipeline group of the next (1) or the previous (-1) stage; chunks go round in circles."""
        return (self.groups.pp.rank() + step) % self.groups.pp.size()

    def _receive(self, chunk: BlockDiffusionModel, batch: Batch) -> Tensor:
        """Hidden states [S, B, H] of the stage before; this rank's slice of S under sequence parallelism."""
        rows = batch.input_ids_S.numel() // (self.groups.tp.size() if chunk.config.sequence_parallel else 1)
        hidden_SBH = torch.empty(rows, 1, chunk.config.hidden_size, dtype=chunk.config.params_dtype, device=self.device)
        dist.recv(hidden_SBH, group=self.groups.pp, group_src=self._stage(-1))
        return hidden_SBH


@contextmanager
def _evaluating(chunks: tuple[BlockDiffusionModel, ...]) -> Iterator[None]:
    """Evaluation mode, and back."""
    modes = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def as_scorer(model: BlockDiffusionModel | LoadedModel | Scorer) -> Scorer:
    """The scorer of a bare model, of what ``load_model`` returns, or of itself."""
    if isinstance(model, LoadedModel):
        return ModelScorer(model.model)
    return ModelScorer(model) if isinstance(model, BlockDiffusionModel) else model
