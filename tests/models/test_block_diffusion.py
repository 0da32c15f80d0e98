"""Block-diffusion logits against equation (3) as a dense mask, and what may be left out of the computation."""

from __future__ import annotations

import pytest
import torch
from llada_kernels import IntervalMask

from llada_mega.config.model import ModelConfig
from llada_mega.models import build_model, mask_carrier
from tests.models import reference
from tests.models.helpers import (
    MASK_ID,
    assert_close,
    bdlm_inputs,
    dense_config,
    hf_weights,
    moe_config,
    noisy_and_clean,
    randomize,
)

pytestmark = pytest.mark.latest
DOCUMENTS = [10, 1, 6, 7]
LENGTH = sum(DOCUMENTS)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("block_size", [1, 4, 7, 64])
def test_logits_equal_equation_3(block_size: int, backend: str) -> None:
    config = dense_config("qwen3", qk_norm=True, attention_backend=backend)
    model = build_model(config, dtype=torch.float64)
    randomize(model)
    ids, position, carrier, _ = bdlm_inputs(config, DOCUMENTS, block_size)
    with torch.no_grad():
        actual = model(ids, position, carrier)
        mask = reference.equation_3(DOCUMENTS, block_size)
        expected = reference.logits(ids, position, mask, hf_weights(model), config)[0]
    assert_close(actual, expected, 1e-12)


def losses_and_gradients(config: ModelConfig, block_size: int, keep_clean: torch.Tensor):
    """Loss and gradients over the masked rows when only ``keep_clean`` of the clean half is computed."""
    model = build_model(config, dtype=torch.float64)
    randomize(model)
    ids, masked = noisy_and_clean(config, DOCUMENTS)
    kept = torch.cat([torch.arange(LENGTH), LENGTH + keep_clean])
    mask = IntervalMask.block_diffusion(DOCUMENTS, block_size).select_rows(kept).select_keys(kept)
    position = reference.positions(DOCUMENTS).repeat(2)[None]
    rows = masked.nonzero()[:, 0]
    out = model(
        ids[:, kept],
        position[:, kept],
        mask_carrier.pack(mask),
        logit_rows_R=rows,
        labels_R=ids[0, LENGTH + rows],
        weights_R=torch.linspace(0.5, 2.0, len(rows)),
    )
    out.loss_sum.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("make_config", [dense_config, moe_config])
def test_unseen_clean_tokens_can_be_left_out(make_config) -> None:
    """The clean copy of a document's last block is seen by no noisy row."""
    block_size = 4
    seen = [k // block_size < (n - 1) // block_size for n in DOCUMENTS for k in range(n)]
    some, some_gradients = losses_and_gradients(make_config(), block_size, torch.tensor(seen).nonzero()[:, 0])
    everything, all_gradients = losses_and_gradients(make_config(), block_size, torch.arange(LENGTH))
    assert not all(seen)
    assert_close(some.loss_sum, everything.loss_sum, 1e-12)
    for name, gradient in all_gradients.items():
        assert_close(some_gradients[name], gradient, 1e-9, name)


def test_mdlm_is_the_extreme_case() -> None:
    """With one block a document no clean token is needed; what is left is the MDLM mask over L."""
    config = dense_config()
    none = torch.arange(0)
    extreme, gradients = losses_and_gradients(config, 64, none)
    everything, all_gradients = losses_and_gradients(config, 64, torch.arange(LENGTH))
    model = build_model(config, dtype=torch.float64)
    randomize(model)
    ids, masked = noisy_and_clean(config, DOCUMENTS)
    rows = masked.nonzero()[:, 0]
    mdlm = model(
        ids[:, :LENGTH],
        reference.positions(DOCUMENTS)[None],
        mask_carrier.pack(IntervalMask.mdlm(DOCUMENTS)),
        logit_rows_R=rows,
        labels_R=ids[0, LENGTH + rows],
        weights_R=torch.linspace(0.5, 2.0, len(rows)),
    )
    assert_close(extreme.loss_sum, everything.loss_sum, 1e-12)
    assert_close(mdlm.loss_sum, everything.loss_sum, 1e-12)
    for name, gradient in all_gradients.items():
        assert_close(gradients[name], gradient, 1e-9, name)


def test_chosen_rows_are_rows_of_all_logits() -> None:
    config = dense_config()
    model = build_model(config)
    ids, position, carrier, masked = bdlm_inputs(config, DOCUMENTS, 4)
    rows = masked.nonzero()[:, 0].flip(0)
    with torch.no_grad():
        everything = model(ids, position, carrier)
        chosen = model(ids, position, carrier, logit_rows_R=rows)
    assert everything.shape == (2 * LENGTH, config.vocab_size)
    torch.testing.assert_close(chosen, everything[rows])
    assert (ids[0, rows] == MASK_ID).all()


def test_padding_rows_change_nothing() -> None:
    config = moe_config()
    model = build_model(config)
    ids, position, _, masked = bdlm_inputs(config, DOCUMENTS, 4)
    mask = IntervalMask.block_diffusion(DOCUMENTS, 4)
    rows, extra = masked.nonzero()[:, 0], 16
    padded = mask.pad(mask.total_q + extra, mask.total_k + extra)
    filler = torch.zeros(1, extra, dtype=torch.int64)
    padding = torch.arange(mask.total_q + extra)[None] >= mask.total_q
    with torch.no_grad():
        expected = model(ids, position, mask_carrier.pack(mask), logit_rows_R=rows)
        actual = model(
            torch.cat([ids, filler], 1),
            torch.cat([position, filler], 1),
            mask_carrier.pack(padded),
            padding_mask_BS=padding,
            logit_rows_R=rows,
        )
    assert torch.isfinite(actual).all()
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("make_config", [dense_config, moe_config])
def test_bfloat16_is_close_to_float32(make_config) -> None:
    """Parameters and hidden states in bfloat16, losses and logits in fp32."""
    config = make_config(init_std=0.05)
    ids, position, carrier, masked = bdlm_inputs(config, DOCUMENTS, 4)
    rows = masked.nonzero()[:, 0]
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(config, dtype=dtype)
        out = model(ids, position, carrier, logit_rows_R=rows, labels_R=ids[0, LENGTH + rows])
        out.loss_sum.backward()
        assert out.loss_sum.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters() if p.grad is not None}
        losses[dtype] = out.cross_entropy_R
    assert_close(losses[torch.bfloat16], losses[torch.float32], 0.02)
