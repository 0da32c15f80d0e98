"""Models that cannot be built: one line that names the key, the value and the fix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.models import build_model
from llada_mega.models.config import check_model, padded_vocab_size
from tests.models.helpers import dense_config, moe_config

pytestmark = pytest.mark.latest


def changed_moe(**changes: Any) -> ModelConfig:
    config = moe_config()
    config.moe = replace(config.moe, **changes)
    return config


BAD: list[tuple[ModelConfig, ParallelConfig, str]] = [
    (
        dense_config(num_attention_heads=16, num_query_groups=16),
        ParallelConfig(tp=3),
        r"parallel\.tp=3 does not divide model\.num_attention_heads=16; use 1, 2, 4, 8 or 16$",
    ),
    (dense_config(), ParallelConfig(tp=6), r"parallel\.tp=6 does not divide model\.num_query_groups=2"),
    (dense_config(), ParallelConfig(pp=2), r"parallel\.pp=2 x parallel\.vp=1 does not divide model\.num_layers=3"),
    (dense_config(num_query_groups=4), ParallelConfig(), r"num_query_groups=4 does not divide .*num_attention_heads=6"),
    (dense_config(rotary_percent=0.3), ParallelConfig(), r"model\.rotary_percent=0\.3 .*use 1\.0 or 0\.5"),
    (dense_config(implementation="fast"), ParallelConfig(), r"implementation=fast is unknown; use auto, local or te"),
    (dense_config(attention_backend="magic"), ParallelConfig(), r"model\.attention_backend=magic: "),
    (dense_config(), ParallelConfig(recompute="some"), r"parallel\.recompute=some is not a choice"),
    (changed_moe(top_k=2), ParallelConfig(), r"model\.moe\.top_k=2 must be 2 x model\.moe\.group_top_k=2"),
    (changed_moe(num_experts=15), ParallelConfig(), r"num_groups=4 does not divide model\.moe\.num_experts=15"),
    (changed_moe(group_top_k=8, top_k=16), ParallelConfig(), r"group_top_k=8 exceeds model\.moe\.num_groups=4"),
    (changed_moe(num_groups=1, top_k=17), ParallelConfig(), r"top_k=17 exceeds the 16 experts"),
    (changed_moe(), ParallelConfig(ep=3), r"parallel\.ep=3 does not divide model\.moe\.num_experts=16"),
    (changed_moe(), ParallelConfig(dispatcher="magic"), r"parallel\.dispatcher=magic is not a choice"),
    (moe_config(num_layers=4), ParallelConfig(pp=2, dispatcher="allgather"), r"use parallel\.dispatcher=alltoall"),
    (changed_moe(), ParallelConfig(tp=2), r"with experts needs sequence parallelism; set parallel\.sp=true"),
]


@pytest.mark.parametrize(("model", "parallel", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_models_are_refused(model: ModelConfig, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(model, parallel)
    assert "\n" not in str(caught.value)


def test_one_group_means_no_groups() -> None:
    """Without groups any top_k will do."""
    build_model(changed_moe(num_groups=1, group_top_k=1, top_k=3))


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(157184, 1, 157184), (49153, 1, 49280), (150, 4, 512)])
def test_vocabulary_padding(vocab: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tp) == padded


def test_weights_depend_on_the_seed_only() -> None:
    one, two, other = (build_model(moe_config(), seed=seed).state_dict() for seed in (1, 1, 2))
    matrices = [name for name, tensor in one.items() if tensor is not None and tensor.dim() == 2]
    assert all(torch.equal(one[name], two[name]) for name in matrices)
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    spread = one["decoder.layers.0.mlp.linear_fc1.weight"].std()
    assert float(spread) == pytest.approx(moe_config().init_std, rel=0.05)
    assert not one["output_layer.weight"][150:].any()
