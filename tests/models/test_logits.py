"""Chunked output projection and cross entropy against the plain computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.live_memory import LiveMemory
from llada_mega.models.logits import chunked_cross_entropy
from llada_mega.parallel import ensure_single_process
from tests.models.helpers import assert_close

pytestmark = pytest.mark.latest
ROWS, HIDDEN, VOCAB, PADDED = 37, 12, 50, 64


def inputs(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    weights[-3:] = 0.0  # filler rows
    return hidden, weight, labels, weights


def plain(hidden, weight, labels, weights):
    logits = F.linear(hidden, weight[:VOCAB])
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    return (cross_entropy * weights).sum(), cross_entropy, logits.argmax(-1) == labels


@pytest.mark.parametrize("chunk_rows", [1, 10, 37, 1000])
def test_losses_and_gradients_in_float64(chunk_rows: int) -> None:
    hidden, weight, labels, weights = inputs(torch.float64)
    expected, cross_entropy, correct = plain(hidden, weight, labels, weights.double())
    expected_gradients = torch.autograd.grad(2.5 * expected, (hidden, weight))
    group = ensure_single_process().tp
    out = chunked_cross_entropy(
        hidden, weight, labels, weights, vocab_size=VOCAB, tp_group=group, chunk_rows=chunk_rows
    )
    gradients = torch.autograd.grad(2.5 * out.loss_sum, (hidden, weight))
    assert_close(out.loss_sum, expected, 1e-12)
    assert_close(out.cross_entropy_R, cross_entropy, 1e-12)
    assert torch.equal(out.correct_R, correct)
    assert not out.cross_entropy_R.requires_grad
    assert_close(gradients[0], expected_gradients[0], 1e-12)
    assert_close(gradients[1], expected_gradients[1], 1e-12)
    assert not gradients[1][VOCAB:].any()


def test_bfloat16_losses_are_float32() -> None:
    hidden, weight, labels, weights = inputs(torch.bfloat16)
    expected, _, _ = plain(hidden.float(), weight.float(), labels, weights)
    group = ensure_single_process().tp
    out = chunked_cross_entropy(hidden, weight, labels, weights, vocab_size=VOCAB, tp_group=group, chunk_rows=8)
    out.loss_sum.backward()
    assert out.loss_sum.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert_close(out.loss_sum, expected, 1e-2)


def test_no_gradient_is_computed_when_none_is_wanted() -> None:
    hidden, weight, labels, weights = inputs(torch.float32)
    group = ensure_single_process().tp
    with torch.no_grad():
        out = chunked_cross_entropy(hidden, weight, labels, weights, vocab_size=VOCAB, tp_group=group)
    expected, _, _ = plain(hidden, weight, labels, weights)
    assert not out.loss_sum.requires_grad
    assert_close(out.loss_sum, expected, 1e-6)


@pytest.mark.parametrize("gradients", [True, False])
def test_logits_of_one_chunk_are_there_at_a_time(gradients: bool) -> None:
    group, rows, hidden, vocab = ensure_single_process().tp, 512, 8, 1024
    hidden_RH = torch.randn(rows, hidden, requires_grad=gradients)
    weight_VH = torch.randn(vocab, hidden, requires_grad=gradients)
    labels, weights = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)

    def peak(chunk_rows: int) -> int:
        with LiveMemory({}) as tracker:
            chunked_cross_entropy(
                hidden_RH, weight_VH, labels, weights, vocab_size=vocab, tp_group=group, chunk_rows=chunk_rows
            )
        return tracker.peak

    whole, quarter = peak(rows), peak(rows // 4)
    assert whole - quarter == pytest.approx(3 / 4 * rows * vocab * 4, rel=0.05)


def test_a_tie_goes_to_the_smallest_token_id() -> None:
    group = ensure_single_process().tp
    labels = torch.tensor([0, 1])
    out = chunked_cross_entropy(
        torch.zeros(2, 4), torch.zeros(8, 4), labels, torch.ones(2), vocab_size=8, tp_group=group
    )
    assert out.correct_R.tolist() == [True, False]


def test_no_rows() -> None:
    group = ensure_single_process().tp
    hidden = torch.zeros(0, 4, requires_grad=True)
    out = chunked_cross_entropy(
        hidden, torch.zeros(8, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), vocab_size=8, tp_group=group
    )
    out.loss_sum.backward()
    assert float(out.loss_sum) == 0.0


def test_a_second_backward_pass_is_refused() -> None:
    """The gradients are scaled in place: better an error than a wrong number."""
    hidden, weight, labels, weights = inputs(torch.float32)
    group = ensure_single_process().tp
    out = chunked_cross_entropy(hidden, weight, labels, weights, vocab_size=VOCAB, tp_group=group)
    out.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.loss_sum.backward()
