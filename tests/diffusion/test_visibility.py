from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import interval_attention
from torch import Tensor

from llada_mega.diffusion.blocks import index_blocks
from llada_mega.diffusion.visibility import build_visibility
from llada_mega.errors import ConfigError


def tokens(samples: list[list[tuple[int, bool]]], block_size: int, block_origin: str) -> list[tuple[int, int, bool]]:
    """(document, block, padding) of every token, counted one by one; a sample is a list of (length, padding)."""
    out = []
    document = 0
    for sample in samples:
        position_in_sample = 0
        for length, padding in sample:
            for position in range(length):
                origin = position if block_origin == "document" else position_in_sample
                out.append((document, origin // block_size, padding))
                position_in_sample += 1
            document += 1
    return out


def dense_oracle(layout: str, members: list[tuple[int, int, bool]]) -> Tensor:
    """Equations (3) and (4) read literally, pair by pair; for bdlm over the full [noisy ; clean]."""
    length = len(members)
    size = 2 * length if layout == "bdlm" else length
    mask = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            document_q, block_q, padding_q = members[query % length]
            document_k, block_k, padding_k = members[key % length]
            if document_q != document_k or padding_q or padding_k:
                continue
            if layout == "ar":
                mask[query, key] = key <= query
            elif layout == "mdlm":
                mask[query, key] = True
            elif query < length:
                mask[query, key] = block_q == block_k if key < length else block_q > block_k
            else:
                mask[query, key] = key >= length and block_q >= block_k
    return mask


documents = st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=3)
packings = {
    "samples": st.lists(documents, min_size=1, max_size=3),
    "block_size": st.integers(1, 9),
    "block_origin": st.sampled_from(["document", "sequence"]),
}


def arguments(samples: list[list[tuple[int, bool]]], block_size: int, block_origin: str) -> dict[str, object]:
    flat = [document for sample in samples for document in sample]
    return {
        "document_lengths": [length for length, _ in flat],
        "padding": [padding for _, padding in flat],
        "block_size": block_size,
        "block_origin": block_origin,
        "sequence_lengths": [sum(length for length, _ in sample) for sample in samples],
    }


@settings(max_examples=300, deadline=None)
@given(layout=st.sampled_from(["ar", "mdlm", "bdlm"]), clean_tokens=st.sampled_from(["needed", "all"]), **packings)
def test_mask_equals_the_equations(layout: str, clean_tokens: str, **packing) -> None:
    keys = arguments(**packing)
    visibility = build_visibility(layout, clean_tokens=clean_tokens, **keys)
    members = tokens(**packing)
    expected = dense_oracle(layout, members)
    length = len(members)
    kept = list(range(length))
    if layout == "bdlm":
        last_block = {document: block for document, block, _ in members}
        needed = [
            i for i, (document, block, padding) in enumerate(members) if not padding and block < last_block[document]
        ]
        positions = needed if clean_tokens == "needed" else list(range(length))
        assert visibility.clean_positions.tolist() == positions
        kept += [length + position for position in positions]
    else:
        assert visibility.clean_positions.numel() == 0
    assert visibility.clean_positions.dtype == torch.int64
    visibility.mask.validate()
    assert torch.equal(visibility.mask.dense(), expected[kept][:, kept])


@settings(max_examples=60, deadline=None)
@given(**packings)
def test_what_is_left_out_is_seen_by_nobody_that_matters(**packing) -> None:
    """Follow the visible keys from the noisy rows until nothing is added: exactly the kept rows are reached."""
    keys = arguments(**packing)
    members = tokens(**packing)
    length = len(members)
    sees = dense_oracle("bdlm", members)
    reached = torch.zeros(2 * length, dtype=torch.bool)
    reached[:length] = True
    while True:
        grown = reached | sees[reached].any(0)
        if torch.equal(grown, reached):
            break
        reached = grown
    clean_positions = build_visibility("bdlm", clean_tokens="needed", **keys).clean_positions
    assert clean_positions.tolist() == reached[length:].nonzero().flatten().tolist()


@pytest.mark.parametrize("block_origin", ["document", "sequence"])
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_noisy_outputs_and_gradients_do_not_change(block_size: int, block_origin: str) -> None:
    """Two attention layers in float64: noisy outputs and input gradients with and without unseen clean tokens."""
    keys = arguments([[(7, False), (1, False), (4, True)], [(12, False)]], block_size, block_origin)
    length = 24
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(length, 8, generator=generator, dtype=torch.float64)
    clean = torch.randn(length, 8, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) / 3
    results = []
    for clean_tokens in ("all", "needed"):
        visibility = build_visibility("bdlm", clean_tokens=clean_tokens, **keys)
        inputs = (noisy.clone().requires_grad_(), clean.clone().requires_grad_(), weights.clone().requires_grad_())
        hidden = torch.cat((inputs[0], inputs[1][visibility.clean_positions]))
        for layer in inputs[2]:
            query, key, value = (hidden @ projection for projection in layer)
            attended = interval_attention(
                query[None, :, None], key[None, :, None], value[None, :, None], visibility.mask, backend="reference"
            )
            hidden = hidden + torch.tanh(attended[0, :, 0])
        output = hidden[:length]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for full, reduced in zip(*results, strict=True):
        torch.testing.assert_close(reduced, full, rtol=1e-12, atol=1e-12)
    assert results[1][2].abs().sum() > 0 or block_size == 16


def test_one_block_a_document_is_mdlm() -> None:
    keys = arguments([[(5, False), (8, False), (3, True)]], 8, "document")
    bdlm, mdlm = (build_visibility(layout, **keys) for layout in ("bdlm", "mdlm"))
    assert bdlm.clean_positions.numel() == 0
    assert torch.equal(bdlm.mask.endpoints, mdlm.mask.endpoints) and bdlm.mask.total_k == 16


def test_half_blocks_drop_a_quarter_of_all_positions() -> None:
    keys = arguments([[(64, False)]], 32, "document")
    assert build_visibility("bdlm", **keys).mask.total_q == 96


def test_blocks_of_both_origins() -> None:
    document = index_blocks([3, 6], 4)
    sequence = index_blocks([3, 6], 4, "sequence")
    assert document.block_L.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert sequence.block_L.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert sequence.segments().tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3]
    assert sequence.in_last_block().tolist() == [True] * 3 + [False] * 5 + [True]
    assert index_blocks([3, 6], 4, "sequence", [3, 6]).block_L.tolist() == document.block_L.tolist()


@pytest.mark.parametrize(
    ("layout", "keys", "message"),
    [
        ("causal", {}, "layout=causal is unknown"),
        ("bdlm", {"clean_tokens": "some"}, r"data\.clean_tokens=some is unknown"),
        ("bdlm", {"clean_tokens": "all", "block_origin": "token"}, r"data\.block_origin=token is unknown"),
        ("bdlm", {"block_size": 0}, "block_size=0"),
    ],
)
def test_errors(layout: str, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_visibility(layout, **{"document_lengths": [4], "padding": [False], "block_size": 2} | keys)
