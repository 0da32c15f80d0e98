"""TransformerEngine's layers against the local ones on a GPU: numbers, and checkpoints of either read by the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llada_mega.checkpoint.checkpoint import load_model_weights, model_state
from llada_mega.checkpoint.save import CheckpointWrite
from llada_mega.config.model import ModelConfig
from llada_mega.models import BlockDiffusionModel, build_model
from llada_mega.models.naming import global_names
from llada_mega.parallel import capabilities
from tests.models.helpers import assert_close, bdlm_inputs, dense_config, moe_config
from tests.models.te_keys import sharded_tensors

pytestmark = pytest.mark.gpu
DOCUMENTS, BLOCK = (48, 80), 16
# TransformerEngine's kernels want dimensions that are multiples of 16 in 16-bit.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 32, "ffn_hidden_size": 192}
MODELS = {
    "qwen2": dense_config("qwen2", tie_embeddings=True, qkv_bias=True, **SIZES),
    "qwen3": dense_config("qwen3", qk_norm=True, **SIZES),
    "moe": moe_config(**SIZES),
}
MODELS["moe"].moe = dataclasses.replace(MODELS["moe"].moe, expert_ffn_hidden_size=64, shared_expert_ffn_hidden_size=64)


@pytest.fixture(autouse=True)
def needs_transformer_engine() -> None:
    if (reason := capabilities.obstacle(capabilities.TE)) is not None:
        pytest.skip(f"TransformerEngine cannot be used: {reason}")


def pair(config: ModelConfig, dtype: torch.dtype) -> tuple[BlockDiffusionModel, BlockDiffusionModel]:
    """The model with TransformerEngine's layers and with local ones, with the same weights."""
    te = build_model(dataclasses.replace(config, implementation="te"), dtype=dtype)
    local = build_model(dataclasses.replace(config, implementation="local"), dtype=dtype)
    return te, local


def tensors(model: BlockDiffusionModel) -> dict[str, Tensor]:
    """The model's own tensors by their name in the whole model."""
    state = model.state_dict()
    return {whole: state[local] for local, whole in global_names(model).items()}


def loss_and_gradients(model: BlockDiffusionModel, config: ModelConfig) -> tuple[Tensor, dict[str, Tensor]]:
    ids, positions, carrier, masked = bdlm_inputs(config, DOCUMENTS, BLOCK)
    rows = masked.nonzero().squeeze(1)
    labels = ids[0, masked.numel() :][masked]
    losses = model(ids.cuda(), positions.cuda(), carrier, logit_rows_R=rows.cuda(), labels_R=labels.cuda())
    losses.loss_sum.backward()
    names = global_names(model)
    gradients = {names[name]: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return losses.loss_sum, gradients


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_gives_the_same_weights(name: str) -> None:
    te, local = pair(MODELS[name], torch.float32)
    mine, theirs = tensors(te), tensors(local)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", MODELS)
# TransformerEngine multiplies float32 matrices in TF32: ten bits of mantissa, as float16 has.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 6e-2)])
def test_loss_and_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    te, local = pair(MODELS[name], dtype)
    loss, gradients = loss_and_gradients(te, MODELS[name])
    local_loss, local_gradients = loss_and_gradients(local, MODELS[name])
    assert_close(loss, local_loss, tolerance, "loss")
    assert gradients.keys() == local_gradients.keys()
    for key, gradient in gradients.items():
        assert_close(gradient.float(), local_gradients[key].float(), tolerance, key)


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    te, local = pair(MODELS[name], torch.bfloat16)
    ids, positions, carrier, _ = bdlm_inputs(MODELS[name], DOCUMENTS, BLOCK)
    with torch.no_grad():
        logits, expected = (model(ids.cuda(), positions.cuda(), carrier) for model in (te, local))
    assert_close(logits, expected, 6e-2, "logits")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("writer", ["te", "local"])
def test_checkpoints_interchange(name: str, writer: str, tmp_path: Path) -> None:
    te, local = pair(MODELS[name], torch.float32)
    assert sharded_tensors([te]) == sharded_tensors([local])
    source, target = (te, local) if writer == "te" else (local, te)
    with torch.no_grad():
        for index, tensor in enumerate(tensors(source).values()):  # norms and biases away from 1 and 0
            tensor.add_(0.01 * (index + 1))
    write = CheckpointWrite(tmp_path / "checkpoint")
    write.start({"model": model_state([source])})
    write.write()
    write.finish(MODELS[name], {})
    load_model_weights(tmp_path / "checkpoint", target)
    loaded = tensors(target)
    for key, tensor in tensors(source).items():
        assert torch.equal(tensor, loaded[key]), key
