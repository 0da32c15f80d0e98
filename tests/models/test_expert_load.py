"""Expert load and bias: what counts, how often, and in which direction the bias moves."""

from __future__ import annotations

import pytest
import torch
from llada_kernels import IntervalMask

from llada_mega.config.run import ParallelConfig
from llada_mega.models import BlockDiffusionModel, build_model, discard_expert_load, mask_carrier, update_expert_bias
from llada_mega.models.router import BalancedRouter
from tests.models.helpers import bdlm_inputs, dense_config, moe_config, random_ids

pytestmark = pytest.mark.latest
DOCUMENTS = [10, 6]


def routers(model: BlockDiffusionModel) -> list[BalancedRouter]:
    return [module for module in model.modules() if isinstance(module, BalancedRouter)]


def step(model: BlockDiffusionModel, padding_rows: int = 0) -> None:
    """One forward and backward over real documents and ``padding_rows`` rows of padding with tokens of its own."""
    ids, position, _, masked = bdlm_inputs(model.model_config, DOCUMENTS, 4)
    mask = IntervalMask.block_diffusion(DOCUMENTS, 4)
    length = mask.total_q + padding_rows
    ids = torch.cat([ids, random_ids(model.model_config, padding_rows, seed=9)], 1)
    position = torch.nn.functional.pad(position, (0, padding_rows))
    rows = masked.nonzero()[:, 0]
    out = model(
        ids,
        position,
        mask_carrier.pack(mask.pad(length, length)),
        padding_mask_BS=torch.arange(length)[None] >= mask.total_q,
        logit_rows_R=rows,
        labels_R=ids[0, rows + len(masked)],
    )
    out.loss_sum.backward()


def test_every_real_token_counts_top_k_times() -> None:
    config = moe_config()
    model = build_model(config)
    step(model)
    loads = update_expert_bias(model)
    assert loads is not None
    assert loads.shape == (2, 16)
    assert loads.sum(dim=1).tolist() == [2 * sum(DOCUMENTS) * config.moe.top_k] * 2
    assert all(not router.local_tokens_per_expert.any() for router in routers(model))


def test_doubling_the_padding_changes_no_bias() -> None:
    biases = []
    for padding_rows in (0, 32, 64):
        model = build_model(moe_config())
        for _ in range(3):
            step(model, padding_rows)
            update_expert_bias(model)
        biases.append(torch.stack([router.expert_bias.clone() for router in routers(model)]))
    assert biases[0].abs().max() > 0
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], biases[2])


def test_the_bias_rises_where_the_load_is_low() -> None:
    model = build_model(moe_config())
    router = routers(model)[0]
    router.local_tokens_per_expert += torch.tensor([0, 8] + [4] * 14)
    update_expert_bias(model, rate=0.01)
    assert router.expert_bias.tolist() == pytest.approx([0.01, -0.01] + [0.0] * 14)


def test_the_rate_comes_from_the_model_configuration() -> None:
    config = moe_config()
    config.moe.bias_update_rate = 0.25
    model = build_model(config)
    step(model)
    update_expert_bias(model)
    assert routers(model)[0].expert_bias.abs().max() == 0.25


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_counts_once(recompute: str) -> None:
    parallel = ParallelConfig(recompute=recompute, recompute_modules=["moe"] if recompute == "selective" else [])
    model = build_model(moe_config(), parallel=parallel)
    step(model)
    expected = 2 * sum(DOCUMENTS) * model.model_config.moe.top_k
    assert [int(router.local_tokens_per_expert.sum()) for router in routers(model)] == [expected] * 2


def test_evaluation_does_not_count() -> None:
    model = build_model(moe_config())
    ids, position, carrier, _ = bdlm_inputs(model.model_config, DOCUMENTS, 4)
    with torch.no_grad():
        model(ids, position, carrier)
    model.eval()
    model(ids, position, carrier)
    assert all(not router.local_tokens_per_expert.any() for router in routers(model))


def test_a_skipped_step_leaves_no_trace() -> None:
    model = build_model(moe_config())
    step(model)
    discard_expert_load(model)
    update_expert_bias(model)
    assert all(not router.expert_bias.any() for router in routers(model))


def test_a_dense_model_has_no_load() -> None:
    assert update_expert_bias(build_model(dense_config())) is None
