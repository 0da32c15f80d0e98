"""From a batch to the cross entropy of its predicted rows, whoever runs the model.

Legend: R predicted rows.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.data.batch import Batch
from llada_mega.inference.model import LoadedModel
from llada_mega.models import BlockDiffusionModel, RowLosses, mask_carrier


class RowScores(NamedTuple):
    """Cross entropy in nats (float [R]) and whether the most probable token is the label (bool [R])."""

    cross_entropy_R: Tensor
    correct_R: Tensor


class Scorer(Protocol):
    """Runs the model on a batch. A pipeline-parallel run brings its own."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        ...

    def score(self, batch: Batch) -> RowScores:
        """Scores of the batch's real rows (``batch.num_rows``), without embedding noise and without gradients."""
        ...


class ModelScorer:
    """A model whose layers are all in this process (tensor and expert parallel ranks call it together)."""

    def __init__(self, model: BlockDiffusionModel) -> None:
        self.model = model

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.model_config

    @torch.no_grad()
    def score(self, batch: Batch) -> RowScores:
        """See :class:`Scorer`. The model's training mode is put back."""
        training = self.model.training
        self.model.eval()
        try:
            batch = batch.to(next(self.model.parameters()).device)
            losses = self.model(
                batch.input_ids_S[None],
                batch.position_ids_S[None],
                mask_carrier.pack(batch.mask),
                padding_mask_BS=batch.padding_S[None],
                logit_rows_R=batch.logit_rows_R,
                labels_R=batch.labels_R,
            )
        finally:
            self.model.train(training)
        assert isinstance(losses, RowLosses)
        return RowScores(losses.cross_entropy_R[: batch.num_rows], losses.correct_R[: batch.num_rows])


def as_scorer(model: BlockDiffusionModel | LoadedModel | Scorer) -> Scorer:
    """The scorer of a bare model, of what ``load_model`` returns, or of itself."""
    if isinstance(model, LoadedModel):
        return ModelScorer(model.model)
    return ModelScorer(model) if isinstance(model, BlockDiffusionModel) else model
