"""The last layer computes the logit rows alone: same losses and gradients, other rows do not count in its load."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llada_kernels import IntervalMask
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.models import BlockDiffusionModel, RowLosses, build_model, mask_carrier, update_expert_bias
from tests.models.helpers import assert_close, bdlm_inputs, dense_config, moe_config

pytestmark = pytest.mark.latest
DOCUMENTS, BLOCK_SIZE, FILLERS = [10, 6, 9], 4, 5


def run(model: BlockDiffusionModel, chosen: bool) -> tuple[RowLosses, Tensor]:
    """A forward and backward pass, with or without the rows in the carrier; the losses and the number of rows."""
    ids, position, _, masked = bdlm_inputs(model.model_config, DOCUMENTS, BLOCK_SIZE)
    mask = IntervalMask.block_diffusion(DOCUMENTS, BLOCK_SIZE)
    rows = masked.nonzero()[:, 0]
    labels = torch.nn.functional.pad(ids[0, rows + len(masked)], (0, FILLERS))
    weights = torch.nn.functional.pad(torch.linspace(0.5, 2.0, len(rows)), (0, FILLERS))
    logit_rows = torch.nn.functional.pad(rows, (0, FILLERS))
    losses = model(
        ids,
        position,
        mask_carrier.pack(mask, None, logit_rows, len(rows)) if chosen else mask_carrier.pack(mask),
        padding_mask_BS=torch.zeros_like(ids, dtype=torch.bool),
        logit_rows_R=logit_rows,
        labels_R=labels,
        weights_R=weights,
    )
    losses.loss_sum.backward()
    return losses, rows


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("make_config", [dense_config, moe_config])
def test_losses_and_gradients_are_those_of_all_rows(make_config: Callable[[], ModelConfig], recompute: str) -> None:
    models = [build_model(make_config(), parallel=ParallelConfig(recompute=mode)) for mode in ("none", recompute)]
    (expected, rows), (actual, _) = run(models[0], chosen=False), run(models[1], chosen=True)
    real = slice(len(rows))
    torch.testing.assert_close(actual.cross_entropy_R[real], expected.cross_entropy_R[real], rtol=1e-6, atol=1e-6)
    assert torch.equal(actual.correct_R[real], expected.correct_R[real])
    gradients = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name].grad, parameter.grad, 2e-6, name)


def test_the_last_layer_runs_for_the_logit_rows_alone() -> None:
    model = build_model(moe_config())
    seen = {}
    for layer in model.decoder.layers:
        layer.mlp.register_forward_hook(
            lambda module, inputs, output, number=layer.layer_number: seen.update({number: inputs[0].shape[0]})
        )
    _, rows = run(model, chosen=True)
    assert list(seen.values()) == [2 * sum(DOCUMENTS)] * 2 + [len(rows) + FILLERS]


def test_only_logit_rows_count_in_the_last_layers_load() -> None:
    config = moe_config()
    model = build_model(config)
    _, rows = run(model, chosen=True)
    loads = update_expert_bias(model)
    assert loads is not None
    assert loads.sum(dim=1).tolist() == [2 * sum(DOCUMENTS) * config.moe.top_k, len(rows) * config.moe.top_k]


def test_a_carrier_keeps_its_rows() -> None:
    mask = IntervalMask.block_diffusion(DOCUMENTS, BLOCK_SIZE)
    rows = torch.tensor([1, 4, 20, 0, 0])
    carrier = mask_carrier.pack(mask, None, rows, 3)
    mask_carrier._cache.clear()
    chosen = mask_carrier.unpack(carrier).chosen
    assert chosen is not None
    assert torch.equal(chosen.rows_R, rows)
    assert chosen.on(torch.device("cpu"))[1].tolist() == [False, False, False, True, True]
    assert torch.equal(chosen.mask.dense()[:3], mask.dense()[rows[:3]])
    assert not chosen.mask.dense()[3:].any()
