"""Interval masks against dense booleans written straight from eq. (3) of arXiv 2512.15745."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask
from torch import Tensor


@dataclass
class Layout:
    """Samples of documents; alignment padding is a document of its own after the one it aligns."""

    documents: list[int]
    padding: list[bool]
    samples: list[int]
    block_size: int
    origin: str

    @property
    def arguments(self) -> dict[str, Any]:
        return {"padding": self.padding, "block_origin": self.origin, "sequence_lengths": self.samples}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    alignment = draw(st.sampled_from([1, 1, 4, 8]))
    documents: list[int] = []
    padding: list[bool] = []
    samples: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        before = sum(documents)
        for length in draw(st.lists(st.one_of(st.just(1), st.integers(1, 17)), min_size=1, max_size=5)):
            documents.append(length)
            padding.append(draw(st.integers(0, 9)) == 0)
            if -length % alignment:
                documents.append(-length % alignment)
                padding.append(True)
        samples.append(sum(documents) - before)
    block_size = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 64]))
    return Layout(documents, padding, samples, block_size, draw(st.sampled_from(["document", "sequence"])))


def equation_3(layout: Layout) -> dict[str, Tensor]:
    """Every layout as booleans over pairs of tokens: document, block index, half. Loops on purpose: no intervals."""
    tokens = []  # document, block, position, real of each token
    bounds = [sum(layout.samples[:i]) for i in range(len(layout.samples))]
    for index, length in enumerate(layout.documents):
        start = sum(layout.documents[:index])
        sample_start = max(bound for bound in bounds if bound <= start)
        for offset in range(length):
            origin = start if layout.origin == "document" else sample_start
            block = (start + offset - origin) // layout.block_size
            tokens.append((index, block, start + offset, not layout.padding[index]))
    dq, bq, pq, rq = (torch.tensor(column)[:, None] for column in zip(*tokens, strict=True))
    dk, bk, pk, rk = dq.T, bq.T, pq.T, rq.T
    same = (dq == dk) & rq & rk
    never = torch.zeros_like(same)
    noisy_rows = torch.cat((same & (bq == bk), same & (bq > bk)), 1)
    clean_rows = torch.cat((never, same & (bq >= bk)), 1)
    return {
        "block_diffusion": torch.cat((noisy_rows, clean_rows)),
        "block_causal": same & (bq >= bk),
        "mdlm": same,
        "causal": same & (pq >= pk),
    }


def build(name: str, layout: Layout) -> IntervalMask:
    if name in ("block_diffusion", "block_causal"):
        return getattr(IntervalMask, name)(layout.documents, layout.block_size, **layout.arguments)
    return getattr(IntervalMask, name)(layout.documents, padding=layout.padding)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(layouts())
def test_every_layout_equals_equation_3(layout: Layout) -> None:
    for name, dense in equation_3(layout).items():
        mask = build(name, layout)
        mask.validate()
        assert torch.equal(mask.dense(), dense), name
        assert torch.equal(mask.visible_counts(), dense.sum(1)), name
        assert mask.area() == int(dense.sum())
        assert mask.attention_flops(3, 8) == 4 * int(dense.sum()) * 24
        assert mask.endpoints.dtype == torch.int32 and mask.endpoints.is_contiguous()
        assert mask.endpoints.shape == (5 if name == "block_diffusion" else 3, dense.shape[0])


@settings(max_examples=200, derandomize=True, deadline=None)
@given(layouts(), st.randoms(use_true_random=False), st.integers(0, 9), st.integers(0, 9))
def test_selection_and_padding_equal_dense_indexing(layout: Layout, random: Random, more_q: int, more_k: int) -> None:
    for name, dense in equation_3(layout).items():
        mask = build(name, layout)
        rows = random.choices(range(mask.total_q), k=random.randint(0, mask.total_q))
        keys = sorted(random.sample(range(mask.total_k), random.randint(0, mask.total_k)))
        chosen = mask.select_rows(torch.tensor(rows, dtype=torch.int64)).select_keys(keys)
        chosen.validate()
        expected = dense[rows][:, keys] if rows else dense[:0][:, keys]
        assert torch.equal(chosen.dense(), expected)
        padded = chosen.pad(len(rows) + more_q, len(keys) + more_k)
        padded.validate()
        assert torch.equal(padded.dense(), torch.nn.functional.pad(expected, (0, more_k, 0, more_q)))


def test_block_size_one_is_causal_and_a_whole_document_block_is_mdlm() -> None:
    documents = [5, 1, 9]
    length = sum(documents)
    clean = range(length, 2 * length)
    mask = IntervalMask.block_diffusion(documents, 1).select_rows(clean).select_keys(clean)
    assert torch.equal(mask.dense(), IntervalMask.causal(documents).dense())
    mask = IntervalMask.block_diffusion(documents, 4096)
    assert torch.equal(mask.dense()[:length, :length], IntervalMask.mdlm(documents).dense())
    assert not mask.dense()[:length, length:].any()


def test_large_masks_stay_small() -> None:
    mask = IntervalMask.block_diffusion([100_000] * 4, 32)
    assert mask.endpoints.numel() == 5 * 800_000
    assert mask.area() == 2 * 4 * sum(32 * (block + 1) * 32 for block in range(100_000 // 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntervalMask.mdlm([3, 0]), "document_lengths"),
        (lambda: IntervalMask.mdlm([2.5]), "document_lengths"),
        (lambda: IntervalMask.mdlm([3], padding=[True, False]), "padding has 2 entries for 1"),
        (lambda: IntervalMask.block_diffusion([3], 0), "block_size"),
        (lambda: IntervalMask.block_diffusion([3], 2, block_origin="token"), "block_origin"),
        (lambda: IntervalMask.block_diffusion([3, 4], 2, sequence_lengths=[2, 5]), "sequence_lengths"),
        (lambda: IntervalMask.block_diffusion([3, 4], 2, sequence_lengths=[3]), "sequence_lengths"),
        (lambda: IntervalMask.mdlm([4]).select_rows([4]), r"rows must lie in \[0, 4\)"),
        (lambda: IntervalMask.mdlm([4]).select_rows([-1]), "rows"),
        (lambda: IntervalMask.mdlm([4]).select_keys([2, 1]), "increasing"),
        (lambda: IntervalMask.mdlm([4]).select_keys([1, 1]), "increasing"),
        (lambda: IntervalMask.mdlm([4]).select_keys(torch.tensor([0.5])), "integers"),
        (lambda: IntervalMask.mdlm([4]).pad(3, 4), "cannot pad"),
        (lambda: IntervalMask(torch.zeros(2, 4, dtype=torch.int32), 4), "odd nfunc"),
        (lambda: IntervalMask(torch.zeros(3, 4), 4), "int32"),
        (lambda: IntervalMask(torch.full((1, 4), 5, dtype=torch.int32), 4).validate(), "row 0 are outside"),
        (lambda: IntervalMask(torch.tensor([[2], [1], [3]], dtype=torch.int32), 4).validate(), "row 0 decrease"),
    ],
)
def test_impossible_masks_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
