"""The size of the MASK token's embedding, which decides whether a conversion is stable (arXiv 2512.15745, section 3)."""

from __future__ import annotations

import torch

from llada_mega.models import BlockDiffusionModel


@torch.no_grad()
def embedding_rms(model: BlockDiffusionModel, token_id: int | None = None) -> float:
    """Root mean square of the embedding table's real rows, or of one row; the same number on every tensor-parallel rank.

    Only the first pipeline stage holds the table; elsewhere the result is 0.
    """
    if not model.pre_process:
        return 0.0
    weight_VH = model.embedding.word_embeddings.weight
    tp_group = model.groups.tp
    first = tp_group.rank() * weight_VH.shape[0]
    rows = range(model.model_config.vocab_size) if token_id is None else range(token_id, token_id + 1)
    local_VH = weight_VH[max(rows.start - first, 0) : max(rows.stop - first, 0)]
    square_sum = local_VH.float().square().sum()
    if tp_group.size() > 1:
        torch.distributed.all_reduce(square_sum, group=tp_group)
    return float((square_sum / (len(rows) * weight_VH.shape[1])).sqrt())
