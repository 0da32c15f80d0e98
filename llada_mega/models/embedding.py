"""Token embedding with Gaussian noise on the output at masked positions.

An autoregressive model never saw MASK, and weight decay has driven that row of its embedding table towards zero. A
block of zero hidden states stays zero through every layer, and the gradient of RMSNorm there is 1/sqrt(eps) a layer:
the conversion explodes. The report adds Gaussian noise to the masked token's embedding output during the first
iterations (arXiv 2512.15745). The noise is a pure function of (seed, sample, position, channel), hence the same under
every micro-batch split, parallel layout and recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor

from llada_mega.diffusion.random import Stream, normal_channels


@dataclass(frozen=True)
class EmbeddingNoise:
    """Noise for the masked rows of one micro-batch.

    Attributes:
        std: standard deviation; 0 adds nothing.
        seed: of the run.
        rows_R: int64, masked rows (indices into the whole sequence of S rows), each at most once, no filler rows.
        sample_R: int64, global index of each row's sample.
        position_R: int64, each row's position in its sample.
    """

    std: float
    seed: int
    rows_R: Tensor
    sample_R: Tensor
    position_R: Tensor


class NoisyEmbedding(LanguageModelEmbedding):
    """Megatron's vocabulary-parallel embedding plus :class:`EmbeddingNoise`. Batch size 1 when there is noise."""

    def forward(self, input_ids_BS: Tensor, position_ids_BS: Tensor, noise: EmbeddingNoise | None = None) -> Tensor:
        """int64 ids ``[B, S]`` -> hidden ``[S, 1 or B, H]``, this rank's slice of S under sequence parallelism."""
        hidden_SBH = super().forward(input_ids_BS, position_ids_BS)
        if noise is None or noise.std == 0.0:
            return hidden_SBH
        rows_R, sample_R, position_R = noise.rows_R, noise.sample_R, noise.position_R
        rows_R = rows_R.to(hidden_SBH.device, non_blocking=True)
        noise_RH = normal_channels(noise.seed, Stream.EMBEDDING, sample_R, position_R, hidden_SBH.shape[-1])
        noise_RH = noise_RH * noise.std
        if self.config.sequence_parallel:  # other ranks' rows add zeros somewhere: to leave them out would need a wait
            here_R = rows_R // hidden_SBH.shape[0] == self.tp_group.rank()
            rows_R, noise_RH = rows_R % hidden_SBH.shape[0], noise_RH.where(here_R[:, None], 0.0)
        return hidden_SBH.index_add(0, rows_R, noise_RH.to(hidden_SBH.dtype)[:, None, :])

    @torch.no_grad()
    def table_rms(self, vocab_size: int) -> float:
        """RMS over all channels of the ``vocab_size`` real rows: the default noise std."""
        return float(self._rms(0, vocab_size))

    @torch.no_grad()
    def row_rms(self, token_id: int) -> Tensor:
        """RMS of one token's row, float64 (): ``mask_embedding_rms`` of the metrics for the MASK token."""
        return self._rms(token_id, token_id + 1)

    def _rms(self, first: int, end: int) -> Tensor:
        """Of tokens ``first`` to ``end`` - 1. A collective over the tensor-parallel group."""
        table = self.word_embeddings
        low = max(first - table.vocab_start_index, 0)
        rows = table.weight[low : max(end - table.vocab_start_index, low)]
        total = rows.double().square().sum()
        if self.tp_group.size() > 1:
            dist.all_reduce(total, group=self.tp_group)
        return (total / ((end - first) * table.embedding_dim)).sqrt()
