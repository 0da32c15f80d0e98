"""A batch against a recomputation by loops over positions, straight from eq. (1) and (3)."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.noise_levels import draw_noise_levels
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.random import Stream, uniform
from llada_mega.diffusion.schedule import get_schedule
from llada_mega.errors import ConfigError

MASK, PAD = 999, 998
LINEAR = get_schedule("linear")


def make_sample(lengths: list[int], padding: list[bool], sample_index: int) -> Sample:
    total = sum(lengths)
    real = torch.tensor([not pad for n, pad in zip(lengths, padding, strict=True) for _ in range(n)])
    tokens = (torch.arange(total) * 7 + sample_index * 31) % 900 + 1
    return Sample(tokens * real, lengths, padding, real, sample_index)


def build(samples: list[Sample], **options: Any) -> Batch:
    defaults: dict[str, Any] = {
        "layout": "bdlm",
        "block_size": 4,
        "objective": DiffusionObjective("elbo", LINEAR),
        "schedule": LINEAR,
        "seed": 11,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "length_multiple": 16,
        "row_multiple": 8,
    }
    return build_batch(samples, **{**defaults, **options})


@dataclass(frozen=True)
class Token:
    """One token of the batch, by hand."""

    sample: Sample
    position: int  # in the sample
    document: tuple[int, int]
    in_document: int
    block: int
    last_block: bool
    padding: bool
    t: float


def tokens_of(samples: list[Sample], block_size: int, level: str, origin: str, seed: int = 11) -> list[Token]:
    tokens = []
    for sample in samples:
        t = draw_noise_levels(
            seed, sample.sample_index, sample.document_lengths, block_size, level, 0.2, 0.9, origin
        ).tolist()
        start = 0
        for number, (length, padding) in enumerate(zip(sample.document_lengths, sample.padding, strict=True)):
            for offset in range(length):
                position = start + offset
                block = (offset if origin == "document" else position) // block_size
                last = (length - 1 if origin == "document" else start + length - 1) // block_size
                document = (sample.sample_index, number)
                tokens.append(Token(sample, position, document, offset, block, block == last, padding, t[position]))
            start += length
    return tokens


def sees(query: tuple[Token, str], key: tuple[Token, str], layout: str) -> bool:
    (q, q_copy), (k, k_copy) = query, key
    if q.document != k.document or q.padding:
        return False
    if layout == "ar":
        return k.in_document <= q.in_document
    if layout == "mdlm":
        return True
    if q_copy == "noisy":
        return q.block == k.block if k_copy == "noisy" else q.block > k.block
    return k_copy == "clean" and q.block >= k.block


sample_layouts = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(max_examples=120, deadline=None)
@given(
    sample_layouts,
    st.sampled_from(["bdlm", "mdlm", "ar"]),
    st.sampled_from([1, 3, 4, 64]),
    st.sampled_from(["sequence", "document", "block"]),
    st.sampled_from(["document", "sequence"]),
    st.sampled_from(["needed", "all"]),
)
def test_against_loops(
    layouts: list[list[tuple[int, bool]]], layout: str, block_size: int, level: str, origin: str, clean_tokens: str
) -> None:
    samples = [
        make_sample([n for n, _ in documents], [p for _, p in documents], 5 + 3 * i)
        for i, documents in enumerate(layouts)
    ]
    batch = build(
        samples,
        layout=layout,
        block_size=block_size,
        level=level,
        t_min=0.2,
        t_max=0.9,
        block_origin=origin,
        clean_tokens=clean_tokens,
    )
    tokens = tokens_of(samples, block_size, level, origin)

    def clean(token: Token) -> int:
        return PAD if token.padding else int(token.sample.tokens[token.position])

    def is_masked(token: Token) -> bool:
        draw = uniform(11, Stream.MASK, token.sample.sample_index, torch.tensor([token.position]))
        return layout != "ar" and not token.padding and float(draw) < token.t

    copies = [(token, "noisy") for token in tokens]
    if layout == "bdlm":
        needed = [token for token in tokens if not token.padding and not token.last_block]
        copies += [(token, "clean") for token in (tokens if clean_tokens == "all" else needed)]
    size = -(-len(copies) // 16) * 16
    assert batch.mask.total_q == batch.mask.total_k == size == len(batch.input_ids_S)
    fill = size - len(copies)
    ids = [MASK if copy == "noisy" and is_masked(token) else clean(token) for token, copy in copies]
    assert batch.input_ids_S.tolist() == ids + [PAD] * fill
    assert batch.position_ids_S.tolist() == [token.in_document for token, _ in copies] + [0] * fill
    assert batch.padding_S.tolist() == [token.padding for token, _ in copies] + [True] * fill
    expected = [[sees(query, key, layout) for key in copies] + [False] * fill for query in copies]
    assert batch.mask.dense().tolist() == expected + [[False] * size] * fill

    if layout == "ar":
        rows = [
            (i, clean(after), 1.0, 0.0)
            for i, (token, after) in enumerate(pairwise(tokens))
            if token.document == after.document and not token.padding
        ]
        denominator = len(rows)
    else:
        rows = [(i, clean(token), 1 / token.t, token.t) for i, token in enumerate(tokens) if is_masked(token)]
        denominator = sum(not token.padding for token in tokens)
    assert batch.num_rows == len(rows) and batch.denominator == denominator
    assert batch.num_tokens == sum(not token.padding for token in tokens)
    fillers = max(-(-len(rows) // 8), 1) * 8 - len(rows)
    index, labels, weights, levels = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    assert batch.logit_rows_R.tolist() == index + [0] * fillers
    assert batch.labels_R.tolist() == labels + [0] * fillers
    assert batch.weights_R.tolist() == pytest.approx(weights + [0.0] * fillers)
    assert batch.noise_levels_R.tolist() == pytest.approx(levels + [0.0] * fillers)
    assert batch.row_sample_R.tolist() == [tokens[i].sample.sample_index for i in index] + [0] * fillers
    assert batch.row_position_R.tolist() == [tokens[i].position for i in index] + [0] * fillers


def test_types() -> None:
    batch = build([make_sample([9, 3], [False, True], 0)])
    for name in ("input_ids_S", "position_ids_S", "logit_rows_R", "labels_R", "row_sample_R", "row_position_R"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.weights_R.dtype == batch.noise_levels_R.dtype == torch.float32
    assert batch.padding_S.dtype == torch.bool
    moved = batch.to("meta")
    assert moved.input_ids_S.is_meta and moved.weights_R.is_meta
    assert moved.mask is batch.mask and moved.num_rows == batch.num_rows


def test_clean_tokens_needed_drops_only_what_nobody_sees() -> None:
    samples = [make_sample([16, 7, 1], [False, False, False], 3), make_sample([4, 12], [False, True], 4)]
    needed, whole = (build(samples, clean_tokens=policy, length_multiple=1) for policy in ("needed", "all"))
    noisy = 40
    assert len(whole.input_ids_S) == 2 * noisy
    assert len(needed.input_ids_S) == noisy + 12 + 4  # 3 of 4 blocks of the first document, 1 of 2 of the second
    for name in ("logit_rows_R", "labels_R", "weights_R", "row_position_R"):
        assert torch.equal(getattr(needed, name), getattr(whole, name))
    assert torch.equal(needed.mask.visible_counts()[:noisy], whole.mask.visible_counts()[:noisy])


def test_blocks_as_long_as_documents_need_no_clean_half() -> None:
    samples = [make_sample([16, 7, 1], [False, False, False], 3)]
    bdlm, mdlm = build(samples, block_size=16), build(samples, layout="mdlm", block_size=16)
    for name in ("input_ids_S", "position_ids_S", "padding_S", "logit_rows_R", "labels_R", "weights_R"):
        assert torch.equal(getattr(bdlm, name), getattr(mdlm, name))
    assert torch.equal(bdlm.mask.dense(), mdlm.mask.dense())


def test_noise_does_not_depend_on_the_batch_around_it() -> None:
    samples = [make_sample([16, 8], [False, False], i) for i in range(4)]
    together = build(samples)
    apart = [build([sample]) for sample in samples]
    n = together.num_rows
    assert n == sum(batch.num_rows for batch in apart)
    for name in ("labels_R", "weights_R", "noise_levels_R", "row_sample_R", "row_position_R"):
        expected = torch.cat([getattr(batch, name)[: batch.num_rows] for batch in apart])
        assert torch.equal(getattr(together, name)[:n], expected)
    assert together.denominator == sum(batch.denominator for batch in apart)
    other_seed = build(samples, seed=12)
    assert other_seed.row_position_R.tolist() != together.row_position_R.tolist()


def test_given_noise_levels_and_uniform_weights() -> None:
    samples = [make_sample([16], [False], 0), make_sample([8], [False], 1)]
    options = {"objective": DiffusionObjective("uniform", LINEAR), "noise_levels": [torch.ones(16), torch.zeros(8)]}
    batch = build(samples, **options)
    assert batch.logit_rows_R[:16].tolist() == list(range(16)) and batch.num_rows == 16
    assert batch.denominator == 16 and batch.weights_R[:16].eq(1).all()
    assert batch.weights_R.sum() == 16


def test_prompt_tokens_are_never_masked() -> None:
    sample = make_sample([16], [False], 0)
    sample.supervised[:10] = False
    batch = build([sample], noise_levels=[torch.ones(16)])
    assert batch.logit_rows_R[: batch.num_rows].tolist() == list(range(10, 16))
    assert batch.denominator == 6 and batch.num_tokens == 16
    ar = build([sample], layout="ar")
    assert ar.logit_rows_R[: ar.num_rows].tolist() == list(range(9, 15))


def test_a_batch_without_rows_has_filler_rows() -> None:
    batch = build([make_sample([16], [False], 0)], noise_levels=[torch.full((16,), 1e-9)])
    assert batch.num_rows == 0 and len(batch.logit_rows_R) == 8
    assert batch.weights_R.eq(0).all()


def test_unknown_options() -> None:
    samples = [make_sample([16], [False], 0)]
    for option in ({"layout": "x"}, {"level": "x"}, {"block_origin": "x"}, {"clean_tokens": "x"}, {"block_size": 0}):
        with pytest.raises(ConfigError):
            build(samples, **option)


def test_all_tensors_are_pinned_and_plans_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoints and the logit rows, which stay on the host for now, among them."""
    pinned: list[Tensor] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = build([make_sample([8, 8], [False, True], 0)])
    plan = object()
    batch.mask.plans["backend"] = plan
    result = batch.pin_memory()
    tensors = [value for value in vars(result).values() if torch.is_tensor(value)]
    assert len(tensors) == 9
    assert all(any(tensor is one for one in pinned) for tensor in [*tensors, result.mask.endpoints])
    assert result.mask.plans["backend"] is plan
    assert_equal(batch, result)


def test_a_batch_survives_the_way_from_a_worker() -> None:
    batch = build([make_sample([8, 8], [False, True], 0)])
    batch.mask.plans["backend"] = object()  # which nothing could send
    result = pickle.loads(pickle.dumps(batch))
    assert_equal(batch, result)
    result.weights_R.zero_()  # the arrays can be written to


def assert_equal(one: Batch, two: Batch) -> None:
    for field in fields(Batch):
        mine, other = getattr(one, field.name), getattr(two, field.name)
        if field.name == "mask":
            assert torch.equal(mine.endpoints, other.endpoints) and mine.total_k == other.total_k
        elif torch.is_tensor(mine):
            assert torch.equal(mine, other) and mine.dtype == other.dtype, field.name
        else:
            assert mine == other, field.name
