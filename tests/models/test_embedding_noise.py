"""Gaussian noise on MASK embeddings: why it is needed, and that it depends on nothing but its keys."""

from __future__ import annotations

import math

import pytest
import torch
from llada_kernels import IntervalMask

from llada_mega.config.run import ParallelConfig
from llada_mega.models import BlockDiffusionModel, EmbeddingNoise, build_model, mask_carrier
from tests.models.helpers import MASK_ID, assert_close, dense_config, moe_config, random_ids

pytestmark = pytest.mark.latest
LENGTH, BLOCK = 32, 8


def gradient_norm(model: BlockDiffusionModel, noise_std: float) -> float:
    """Of one step whose first block is fully masked, the MASK embedding being zero."""
    with torch.no_grad():
        model.embedding.word_embeddings.weight[MASK_ID] = 0.0
    clean = random_ids(model.model_config, LENGTH)
    masked = torch.arange(LENGTH) < BLOCK
    ids = torch.cat([clean.masked_fill(masked, MASK_ID), clean], 1)
    rows = masked.nonzero()[:, 0]
    noise = EmbeddingNoise(noise_std, 1, rows, torch.zeros_like(rows), rows)
    out = model(
        ids,
        torch.arange(LENGTH).repeat(2)[None],
        mask_carrier.pack(IntervalMask.block_diffusion([LENGTH], BLOCK)),
        logit_rows_R=rows,
        labels_R=clean[0, rows],
        embedding_noise=noise,
    )
    (out.loss_sum / len(rows)).backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


def deep_config(eps: float):
    """Narrow and 26 layers deep, scaled as a trained model is."""
    return dense_config("llama", num_layers=26, norm_eps=eps, tie_embeddings=True, init_std=0.08)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_zero_mask_embedding_explodes_and_noise_tames_it(eps: float) -> None:
    config = deep_config(eps)
    assert not math.isfinite(gradient_norm(build_model(config), noise_std=0.0))
    model = build_model(config)
    std = model.embedding.table_rms(config.vocab_size)
    assert gradient_norm(model, noise_std=std) < 1e4


def test_only_the_given_rows_change_and_they_change_by_std() -> None:
    model = build_model(dense_config(hidden_size=512, num_attention_heads=64, num_query_groups=64))
    ids = random_ids(model.model_config, 40)
    rows = torch.tensor([3, 7, 39])
    noise = EmbeddingNoise(0.5, 11, rows, torch.tensor([0, 1, 1]), torch.tensor([3, 0, 1]))
    plain = model.embedding(ids, ids)[:, 0]
    noisy = model.embedding(ids, ids, noise)[:, 0]
    difference = (noisy - plain).detach()
    others = torch.ones(40, dtype=torch.bool).index_fill(0, rows, False)
    assert not difference[others].any()
    assert float(difference[rows].std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("make_config", [dense_config, moe_config])
def test_noise_does_not_depend_on_the_micro_batch(make_config, recompute: str) -> None:
    """Two samples in one micro-batch or in two, in either order: the same losses, the same gradients."""
    config = make_config()
    clean = torch.cat([random_ids(config, LENGTH, seed) for seed in (1, 2)])  # two samples
    masked = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5

    def run(micro_batches: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
        model = build_model(config, dtype=torch.float64, parallel=ParallelConfig(recompute=recompute))
        total = 0.0
        for samples in micro_batches:
            truth, hidden = clean[samples].flatten(), masked[samples].flatten()
            rows = hidden.nonzero()[:, 0]
            sample = torch.tensor(samples)[rows // LENGTH] + 100
            out = model(
                torch.cat([truth.masked_fill(hidden, MASK_ID), truth])[None],
                torch.arange(LENGTH).repeat(2 * len(samples))[None],
                mask_carrier.pack(IntervalMask.block_diffusion([LENGTH] * len(samples), BLOCK)),
                logit_rows_R=rows,
                labels_R=truth[rows],
                embedding_noise=EmbeddingNoise(0.3, 7, rows, sample, rows % LENGTH),
            )
            out.loss_sum.backward()
            total += float(out.loss_sum.detach())
        return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    together, gradients = run([[0, 1]])
    for split in ([[0], [1]], [[1, 0]]):
        total, others = run(split)
        assert total == pytest.approx(together, rel=1e-12)
        for name, gradient in gradients.items():
            assert_close(others[name], gradient, 1e-8, name)


def test_rms_of_the_table_ignores_vocabulary_padding() -> None:
    config = dense_config()
    embedding = build_model(config).embedding
    table = embedding.word_embeddings.weight.detach()[: config.vocab_size]
    assert embedding.word_embeddings.weight.shape[0] == 256
    assert embedding.table_rms(config.vocab_size) == pytest.approx(float(table.square().mean().sqrt()), rel=1e-6)
    assert float(embedding.row_rms(5)) == pytest.approx(float(table[5].square().mean().sqrt()), rel=1e-6)
