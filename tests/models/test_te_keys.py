"""The local model against keys and shapes that were recorded from a model with TransformerEngine's layers."""

from __future__ import annotations

import json

import pytest

from llada_mega.models import build_model
from tests.models.te_keys import KEY_FILE, MODELS, global_shapes

pytestmark = pytest.mark.latest
RECORDED = json.loads(KEY_FILE.read_text("utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_local_checkpoints_have_the_keys_and_shapes_of_transformer_engine(name: str) -> None:
    assert global_shapes([build_model(MODELS[name], seed=None)]) == RECORDED[name]


def test_every_model_is_recorded() -> None:
    assert set(RECORDED) == set(MODELS)
