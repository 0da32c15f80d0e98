"""Activation recomputation and the mask carrier that makes it possible."""

from __future__ import annotations

import pytest
import torch
from llada_kernels import IntervalMask
from llada_kernels.exchange import KeyExchange
from llada_kernels.partition import RowPartition

from llada_mega.config.run import ParallelConfig
from llada_mega.models import build_model, mask_carrier
from tests.models.helpers import assert_close, bdlm_inputs, dense_config, moe_config

pytestmark = pytest.mark.latest


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("make_config", [dense_config, moe_config])
def test_recomputation_gives_the_same_gradients(make_config, recompute: str) -> None:
    """Two micro-batches with different masks, both forward passes before both backward passes (as under 1F1B)."""
    config = make_config()

    def gradients(mode: str, forget: bool) -> dict[str, torch.Tensor]:
        modules = ["core_attn"] if mode == "selective" else []
        model = build_model(config, parallel=ParallelConfig(recompute=mode, recompute_modules=modules))
        losses = []
        for documents, block_size in (([10, 6], 4), ([3, 20], 8)):
            ids, position, carrier, masked = bdlm_inputs(config, documents, block_size)
            rows = masked.nonzero()[:, 0]
            out = model(ids, position, carrier, logit_rows_R=rows, labels_R=ids[0, rows + len(masked)])
            losses.append(out.loss_sum)
        if forget:
            mask_carrier._cache.clear()
        for loss in losses:
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients("none", forget=False)
    for forget in (False, True):
        actual = gradients(recompute, forget)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(actual[name], gradient, 1e-6, name)


@pytest.mark.parametrize("documents", [[1], [2], [10, 6]])
def test_a_carrier_is_the_mask(documents: list[int]) -> None:
    mask = IntervalMask.causal(documents)
    carrier = mask_carrier.pack(mask)
    assert carrier.dtype == torch.int32
    assert carrier.device.type == "cpu"
    assert mask_carrier.unpack(carrier).mask is mask
    assert (
        mask_carrier.unpack(carrier.clone()).mask is mask
    )  # recomputation and pipelines hand over other tensor objects
    mask_carrier._cache.clear()
    rebuilt = mask_carrier.unpack(carrier).mask
    assert rebuilt is not mask
    assert torch.equal(rebuilt.dense(), mask.dense())
    assert mask_carrier.unpack(carrier).mask is rebuilt


def test_a_carrier_is_the_exchange_too() -> None:
    mask = IntervalMask.block_diffusion([9, 7], 4)
    exchange = KeyExchange.exact(mask, RowPartition.balanced(mask, 2, 16))
    local, part = exchange.local_mask(mask, 1), exchange.of_rank(1)
    carrier = mask_carrier.pack(local, part)
    assert carrier.dtype == torch.int32
    assert mask_carrier.unpack(carrier.clone()) == (local, part, None)
    mask_carrier._cache.clear()
    rebuilt = mask_carrier.unpack(carrier)
    assert torch.equal(rebuilt.mask.endpoints, local.endpoints)
    assert rebuilt.mask.total_k == local.total_k
    assert rebuilt.exchange is not None and rebuilt.exchange.num_sent == part.num_sent
    assert torch.equal(rebuilt.exchange.places_K, part.places_K)
    assert mask_carrier.unpack(mask_carrier.pack(local)).exchange is None


def test_an_equal_id_from_another_process_is_no_other_mask() -> None:
    first, second = IntervalMask.causal([5]), IntervalMask.mdlm([5])
    carrier = mask_carrier.pack(first)
    foreign = mask_carrier.pack(second).clone()
    foreign[0] = carrier[0]
    assert torch.equal(mask_carrier.unpack(foreign).mask.dense(), second.dense())
    assert torch.equal(mask_carrier.unpack(carrier).mask.dense(), first.dense())


def test_the_cache_is_bounded() -> None:
    for _ in range(2 * mask_carrier.CAPACITY):
        mask_carrier.pack(IntervalMask.causal([4]))
    assert len(mask_carrier._cache) == mask_carrier.CAPACITY
