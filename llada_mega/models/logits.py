"""Output projection and cross entropy of chosen rows, a chunk of rows at a time.

With a vocabulary of 157K and thousands of masked tokens the logits are the largest tensor of a step. Here they never
exist as a whole: each chunk's logits are turned into losses and, when a gradient is wanted, into its share of the
gradients of the hidden states and of the output matrix, and dropped. Peak logit memory is chunk x V/tp.

Legend: R rows, C rows of a chunk, H hidden size, V columns of this tensor-parallel rank (vocabulary padding included).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_ROWS = 1024


class RowLosses(NamedTuple):
    """Losses of the logit rows. Only ``loss_sum`` carries a gradient.

    Attributes:
        loss_sum: scalar, fp32 or fp64: sum over rows of weight x cross entropy (nats).
        cross_entropy_R: unweighted cross entropy of each row (nats).
        correct_R: bool, the most probable token is the label.
    """

    loss_sum: Tensor
    cross_entropy_R: Tensor
    correct_R: Tensor


def chunked_cross_entropy(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_R: Tensor,
    weights_R: Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup,
    chunk_rows: int = CHUNK_ROWS,
) -> RowLosses:
    """Weighted cross entropy of ``hidden_RH @ weight_VH.T`` against ``labels_R``.

    Args:
        hidden_RH: final hidden states, equal on all tensor-parallel ranks; the gradient is summed over them.
        weight_VH: this rank's rows of the output matrix; rows from ``vocab_size`` on (globally) are padding and take
            no part in the softmax.
        labels_R: int64 global token ids below ``vocab_size``.
        weights_R: float weights; a row of weight 0 contributes nothing to loss and gradients.
        vocab_size: real tokens.
        tp_group: ranks that share the vocabulary, in order of their rows.
        chunk_rows: C.
    """
    outputs = _ChunkedCrossEntropy.apply(
        hidden_RH,
        weight_VH,
        labels_R,
        weights_R,
        vocab_size,
        tp_group,
        chunk_rows,
        torch.is_grad_enabled() and (hidden_RH.requires_grad or weight_VH.requires_grad),
    )
    return RowLosses(*outputs)


def row_logits(hidden_RH: Tensor, weight_VH: Tensor, *, vocab_size: int, tp_group: ProcessGroup) -> Tensor:
    """Logits of the real vocabulary, gathered over tensor-parallel ranks: ``[R, vocab_size]``, fp32 at least."""
    hidden_RH = copy_to_tensor_model_parallel_region(hidden_RH, group=tp_group)
    logits = F.linear(hidden_RH, weight_VH)
    logits = gather_from_tensor_model_parallel_region(logits, group=tp_group)
    return logits[:, :vocab_size].to(_wide(logits.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, when the logits are there; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        labels_R: Tensor,
        weights_R: Tensor,
        vocab_size: int,
        tp_group: ProcessGroup,
        chunk_rows: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _wide(hidden_RH.dtype)
        first = tp_group.rank() * weight_VH.shape[0]  # global id of this rank's first row
        num_real = min(max(vocab_size - first, 0), weight_VH.shape[0])
        weights_R = weights_R.to(wide)
        cross_entropy_R = torch.empty(labels_R.shape, dtype=wide, device=hidden_RH.device)
        correct_R = torch.empty(labels_R.shape, dtype=torch.bool, device=hidden_RH.device)
        hidden_grad_RH = torch.empty_like(hidden_RH) if with_gradients else None
        weight_grad_VH: Tensor | None = None
        for start in range(0, labels_R.numel(), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_CH = hidden_RH[rows]
            logits_CV = F.linear(hidden_CH, weight_VH).to(wide)
            logits_CV[:, num_real:] = -torch.inf
            labels_C = labels_R[rows] - first
            owned_C = (labels_C >= 0) & (labels_C < num_real)
            columns_C = labels_C.clamp(0, max(num_real, 1) - 1)  # some column where another rank has the label
            cross_entropy_R[rows], correct_R[rows] = _softmax_(
                logits_CV, labels_C, owned_C, columns_C, first=first, tp_group=tp_group
            )
            if hidden_grad_RH is None:
                del logits_CV  # or it would live until the next chunk's are there
                continue
            # probabilities now: p - onehot is the gradient of the cross entropy
            logits_CV.scatter_add_(1, columns_C[:, None], -owned_C[:, None].to(wide))
            logits_CV *= weights_R[rows, None]
            gradient_CV = logits_CV.to(hidden_RH.dtype)
            del logits_CV
            torch.mm(gradient_CV, weight_VH, out=hidden_grad_RH[rows])
            weight_grad_VH = _accumulate(weight_grad_VH, gradient_CV.t(), hidden_CH, wide)
            del gradient_CV
        loss_sum = (cross_entropy_R * weights_R).sum()
        ctx.tp_group = tp_group
        if hidden_grad_RH is not None:
            if weight_grad_VH is None:  # no rows
                weight_grad_VH = torch.zeros_like(weight_VH)
            ctx.save_for_backward(hidden_grad_RH, weight_grad_VH)
        ctx.mark_non_differentiable(cross_entropy_R, correct_R)
        return loss_sum, cross_entropy_R, correct_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, so one backward pass only: autograd refuses a second one with an error of its own.
        hidden_grad_RH, weight_grad_VH = ctx.saved_tensors
        hidden_grad_RH.mul_(grad_outputs[0])
        weight_grad_VH.mul_(grad_outputs[0])
        if ctx.tp_group.size() > 1:
            dist.all_reduce(hidden_grad_RH, group=ctx.tp_group)
        return hidden_grad_RH, weight_grad_VH.to(hidden_grad_RH.dtype), None, None, None, None, None, None


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """``total + left @ right`` in ``wide``, without a temporary of that size where the dtypes allow."""
    if total is None:
        return torch.mm(left, right).to(wide)
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_(torch.mm(left, right))


def _softmax_(
    logits_CV: Tensor, labels_C: Tensor, owned_C: Tensor, columns_C: Tensor, *, first: int, tp_group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Turn ``logits_CV`` into probabilities in place. Shapes do not depend on which rank has a label: nothing waits.

    Args:
        logits_CV: this rank's columns.
        labels_C: ids of the labels less ``first``, the id of the first column.
        owned_C: whether this rank has a label's column; columns_C: which it is, any where it has not.

    Returns the cross entropy [C] and whether the label is the argmax [C]. A tie for the maximum goes to the smallest
    token id.
    """
    parallel = tp_group.size() > 1
    maximum_C, argmax_C = logits_CV.max(dim=-1)
    local_maximum_C = maximum_C.clone()
    if parallel:
        dist.all_reduce(maximum_C, op=dist.ReduceOp.MAX, group=tp_group)
    logits_CV -= maximum_C[:, None]
    label_logit_C = logits_CV.gather(1, columns_C[:, None]).squeeze(1).where(owned_C, 0.0)
    logits_CV.exp_()
    total_C = logits_CV.sum(dim=-1)
    best_C = torch.where(local_maximum_C == maximum_C, argmax_C + first, torch.iinfo(torch.int64).max)
    if parallel:
        both = torch.stack([label_logit_C, total_C])
        dist.all_reduce(both, group=tp_group)
        label_logit_C, total_C = both.unbind()
        dist.all_reduce(best_C, op=dist.ReduceOp.MIN, group=tp_group)
    logits_CV /= total_C[:, None]
    return total_C.log() - label_logit_C, best_C == labels_C + first
