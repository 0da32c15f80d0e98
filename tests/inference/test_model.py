"""Loaded models: logits of every layout and generation, against a plain model with a dense mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.errors import ConfigError
from llada_mega.inference import LoadedModel
from llada_mega.models import build_model
from tests.models import reference
from tests.models.helpers import MASK_ID, assert_close, dense_config, hf_weights, moe_config, random_ids, randomize

CONFIGS = {
    "llama": dense_config("llama", mask_token_id=MASK_ID, eos_token_id=2, max_position_embeddings=128),
    "moe": moe_config(mask_token_id=MASK_ID, eos_token_id=2, max_position_embeddings=128),
}


def loaded(config: ModelConfig) -> LoadedModel:
    model = build_model(config, dtype=torch.float64)
    randomize(model)
    return LoadedModel(model, None)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded(CONFIGS[request.param])


def dense(document_lengths: list[int], rule: str, block_size: int = 1) -> Tensor:
    document = torch.tensor([i for i, n in enumerate(document_lengths) for _ in range(n)])
    position = reference.positions(document_lengths)
    same = document[:, None] == document[None]
    if rule == "ar":
        return same & (position[:, None] >= position[None])
    if rule == "mdlm":
        return same
    return same & (position[:, None] // block_size >= position[None] // block_size)


def test_logits_of_every_layout(model: LoadedModel) -> None:
    lengths = [[7, 5, 4], [16]]
    weights, config = hf_weights(model.model), model.config
    clean = torch.cat([random_ids(config, 16, seed) for seed in (0, 1)])
    for layout in ("ar", "mdlm"):
        logits = model.logits(clean, layout=layout, document_lengths=lengths)
        assert logits.dtype == torch.float32 and logits.shape == (2, 16, config.vocab_size)
        for row, documents in enumerate(lengths):
            positions = reference.positions(documents)[None]
            expected = reference.logits(clean[row : row + 1], positions, dense(documents, layout), weights, config)
            assert_close(logits[row].double(), expected[0], 1e-6, layout)
    noisy = clean.masked_fill(torch.rand(clean.shape, generator=torch.Generator().manual_seed(2)) < 0.5, MASK_ID)
    both = torch.cat([noisy, clean], dim=1)
    for block_size in (1, 3, 4, 32):
        logits = model.logits(both, layout="bdlm", block_size=block_size, document_lengths=lengths)
        for row, documents in enumerate(lengths):
            positions = reference.positions(documents).repeat(2)[None]
            mask = reference.equation_3(documents, block_size)
            expected = reference.logits(both[row : row + 1], positions, mask, weights, config)
            assert_close(logits[row].double(), expected[0], 1e-6, f"block size {block_size}")


def test_blocks_may_count_from_the_start_of_the_sample() -> None:
    model = loaded(CONFIGS["llama"])
    clean = random_ids(model.config, 12)
    both = torch.cat([clean.masked_fill(torch.arange(12) % 3 == 0, MASK_ID), clean], dim=1)
    by_sequence = model.logits(both, block_size=4, document_lengths=[[6, 6]], block_origin="sequence")
    by_document = model.logits(both, block_size=4, document_lengths=[[6, 6]])
    assert torch.equal(by_sequence[:, :6], by_document[:, :6])
    assert not torch.allclose(by_sequence[:, 6:12], by_document[:, 6:12])


@pytest.mark.parametrize(("block_size", "steps", "threshold"), [(4, 4, 0.95), (4, 2, 0.05), (8, 3, 0.0), (1, 1, 0.5)])
def test_generation_equals_brute_force_on_a_plain_model(
    model: LoadedModel, block_size: int, steps: int, threshold: float
) -> None:
    weights, config = hf_weights(model.model), model.config
    prompt = random_ids(config, 6, 3)[0].tolist()
    out = model.generate(prompt, 14, block_size, steps, threshold, stop_at_eos=False)
    total = -(-20 // block_size) * block_size
    tokens = torch.tensor(prompt + [MASK_ID] * (total - 6))
    passes = 0
    for first in range(6 // block_size * block_size, total, block_size):
        last = first + block_size
        for step in range(steps):
            hidden = [i for i in range(first, last) if tokens[i] == MASK_ID]
            if not hidden:
                break
            wanted = min(len(hidden), block_size // steps + (step < block_size % steps))
            mask = dense([last], "blocks", block_size)
            logits = reference.logits(tokens[None, :last], torch.arange(last)[None], mask, weights, config)[0]
            logits[:, MASK_ID] = -torch.inf
            probability, token = logits.softmax(-1).max(-1)
            ranked = sorted(hidden, key=lambda i: -float(probability[i]))
            above = [i for i in hidden if probability[i] > threshold]
            for i in above if len(above) >= wanted else ranked[:wanted]:
                tokens[i] = token[i]
            passes += 1
    assert out.token_ids == tokens[6:20].tolist()
    assert out.forward_passes == passes


def test_a_prompt_may_be_a_tensor_and_padding_rows_are_never_generated() -> None:
    model = loaded(CONFIGS["llama"])
    prompt = random_ids(model.config, 5)
    assert model.generate(prompt, 6, 4).token_ids == model.generate(prompt[0].tolist(), 6, 4).token_ids
    out = model.generate([], 90, 8, 2, temperature=20.0, stop_at_eos=False)
    assert len(out.token_ids) == 90 and max(out.token_ids) < model.config.vocab_size and MASK_ID not in out.token_ids


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt_ids": [150]}, "prompt_ids holds 150"),
        ({"prompt_ids": [-1]}, "prompt_ids holds -1"),
        ({"prompt_ids": [4] * 100, "max_new_tokens": 29}, "128 positions"),
        ({"prompt_ids": [4], "block_size": 0}, "block_size=0"),
    ],
)
def test_generation_refuses_what_cannot_be(arguments: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        loaded(CONFIGS["llama"]).generate(**arguments)


def test_generation_needs_a_mask_token() -> None:
    with pytest.raises(ConfigError, match="no MASK token"):
        loaded(dense_config("llama")).generate([1, 2])


@pytest.mark.parametrize(
    ("shape", "options", "named"),
    [
        ((1, 7), {"layout": "bdlm"}, "even number"),
        ((8,), {}, "batch, tokens"),
        ((1, 8), {"layout": "ar", "document_lengths": [[4, 3]]}, "do not tile"),
        ((2, 8), {"layout": "ar", "document_lengths": [[8]]}, "do not tile"),
        ((1, 8), {"layout": "causal"}, "layout=causal"),
        ((1, 8), {"block_size": 0}, "block_size"),
    ],
)
def test_logits_refuse_what_does_not_fit(shape: tuple[int, ...], options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        loaded(CONFIGS["llama"]).logits(torch.full(shape, 5), **options)
