"""A batch of the data pipeline through the model.

Legend: S positions, R rows with logits.
"""

from __future__ import annotations

from typing import Any

from llada_mega.data.batch import Batch
from llada_mega.models import mask_carrier
from llada_mega.models.embedding import EmbeddingNoise


def run_batch(model: Any, batch: Batch, embedding_noise: EmbeddingNoise | None = None) -> Any:
    """What ``BlockDiffusionModel.forward`` returns for ``batch``: on the last pipeline stage the losses of its rows.

    Args:
        model: a ``BlockDiffusionModel``, or Megatron's wrapper of one.
        batch: this rank's part, on the model's device.
        embedding_noise: noise for the masked rows.
    """
    return model(
        batch.input_ids_S[None],
        batch.position_ids_S[None],
        mask_carrier.pack(batch.mask, batch.key_exchange, batch.logit_rows_R, batch.num_rows),
        padding_mask_BS=batch.padding_S[None],
        logit_rows_R=batch.logit_rows_R,
        labels_R=batch.labels_R,
        weights_R=batch.weights_R,
        embedding_noise=embedding_noise,
    )
