"""The local model against keys and shapes that were recorded from a model with TransformerEngine's layers."""

from __future__ import annotations

import json

import pytest

from llada_mega.models import build_model
from llada_mega.models.config import padded_vocab_size
from llada_mega.models.hf_mapping import model_tensors
from llada_mega.models.naming import checkpoint_key, is_vocabulary
from tests.models.te_keys import KEY_FILE, MODELS, global_shapes

pytestmark = pytest.mark.latest
RECORDED = json.loads(KEY_FILE.read_text("utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_local_checkpoints_have_the_keys_and_shapes_of_transformer_engine(name: str) -> None:
    assert global_shapes([build_model(MODELS[name], seed=None)]) == RECORDED[name]


def test_every_model_is_recorded() -> None:
    assert set(RECORDED) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_known_without_a_model(name: str) -> None:
    """What conversion writes, tensor by tensor."""
    shapes: dict[str, list[int]] = {}
    for tensor in model_tensors(MODELS[name]):
        key, expert = checkpoint_key(MODELS[name], tensor.name)
        axis = [] if expert is None else [MODELS[name].moe.num_experts]
        assert shapes.setdefault(key, [*axis, *tensor.shape]) == [*axis, *tensor.shape]
        assert (key in RECORDED[name]) and (expert is not None) == (len(RECORDED[name][key]) > len(tensor.shape))
    padded = padded_vocab_size(MODELS[name].vocab_size, tp=1)
    tables = {key: [padded, shape[1]] for key, shape in shapes.items() if is_vocabulary(key)}
    assert shapes | tables == RECORDED[name]
