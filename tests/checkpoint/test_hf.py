"""Hugging Face directories in and out: bit for bit, and every damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_mega.checkpoint.directory import NewDirectory
from llada_mega.checkpoint.hf import import_hf, parse_size, plan_weights, seal_hf
from llada_mega.checkpoint.hf_config import render_config
from llada_mega.checkpoint.source import SourceModel
from llada_mega.checkpoint.streaming import write_files
from llada_mega.errors import CheckpointError
from llada_mega.parallel.workers import ALONE
from tests.checkpoint.tiny import FAMILIES, edit_json, save_model

transformers = pytest.importorskip("transformers")


def export(source: SourceModel, directory: Path, *, max_shard_size: int | str = "5GB", block_size: int = 8) -> None:
    """A Hugging Face directory with the tensors of another one."""
    new = NewDirectory(directory)
    new.start()
    files = plan_weights(
        new.partial,
        source.config,
        lambda name: iter([source.read(name)]),
        dtype=source.dtype,
        max_shard_size=parse_size(max_shard_size),
        stacked_experts=False,
    )
    write_files(files, ALONE)
    content = render_config(source.config, source.dtype, block_size)
    seal_hf(new, files, source.config, content, {}, source.tokenizer_files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_import_and_export_are_bit_for_bit(
    tmp_path: Path, family: str, dtype: torch.dtype, max_shard_size: str
) -> None:
    save_model(tmp_path / "in", family, dtype=dtype, max_shard_size=max_shard_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype="auto")
    source = import_hf(tmp_path / "in")
    assert source.dtype == dtype
    stored: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "in").glob("*.safetensors"):
        stored |= load_file(path)
    for name, tensor in source.state().items():
        assert torch.equal(tensor, stored[name]), name
    export(source, tmp_path / "out", max_shard_size=max_shard_size)
    assert (tmp_path / "out/model.safetensors").exists() == (max_shard_size == "5GB")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded) is type(theirs) and loaded.dtype == dtype and loaded.config.block_size == 8
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    token_ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(token_ids).logits, loaded(token_ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abba").input_ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "in")("abba").input_ids
    assert import_hf(tmp_path / "out").config == source.config


def test_shards_keep_within_their_size_and_the_index_is_whole(tmp_path: Path) -> None:
    save_model(tmp_path / "in")
    export(import_hf(tmp_path / "in"), tmp_path / "out", max_shard_size=70_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and sorted(set(index["weight_map"].values())) == files
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 70_000 and sum(sizes) == index["metadata"]["total_size"]
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (123, 123), ("7", 7)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["lots", "-1GB", 0, "GB"])
def test_wrong_sizes(text: str | int) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size"):
        parse_size(text)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


def refused(directory: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_hf(directory)
    for text in named:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "config.json is missing")


def test_damaged_config(sharded: Path) -> None:
    (sharded / "config.json").write_text("{")
    refused(sharded, "config.json cannot be read")


def test_no_weights(sharded: Path) -> None:
    for path in sharded.glob("model*"):
        path.unlink()
    refused(sharded, "neither model.safetensors nor")


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "is missing")


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(sharded, shard.name, "truncated or damaged")


def test_index_without_a_tensor(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    shard = sharded / weight_map[name]
    save_file({key: value for key, value in load_file(shard).items() if key != name}, shard)
    refused(sharded, name, "missing from", shard.name)


def test_index_that_leaves_the_directory(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"model.norm.weight": "../model.safetensors"})
    refused(sharded, "../model.safetensors")


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of an unsharded model; None removes one. Dots are written as double underscores."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    return tmp_path / "model"


def test_missing_tensor(whole: Path) -> None:
    rewrite(whole, model__norm__weight=None)
    refused(whole, "model.norm.weight is missing")


def test_wrong_shape(whole: Path) -> None:
    rewrite(whole, model__norm__weight=torch.ones(47))
    refused(whole, "model.norm.weight has shape (47,)", "(48,)")


def test_tensor_without_a_place(whole: Path) -> None:
    rewrite(whole, model__layers__0__self_attn__o_proj__bias=torch.ones(48))
    refused(whole, "model.layers.0.self_attn.o_proj.bias has no place")


def test_fewer_layers_than_stored(whole: Path) -> None:
    edit_json(whole / "config.json", num_hidden_layers=1)
    refused(whole, "model.layers.1.", "has no place")


def test_mixed_dtypes(whole: Path) -> None:
    rewrite(whole, model__norm__weight=torch.ones(48, dtype=torch.bfloat16))
    refused(whole, "several dtypes")


def test_untied_output_in_a_tied_model(whole: Path) -> None:
    embedding = load_file(whole / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(whole, lm_head__weight=embedding.clone())
    assert import_hf(whole).config.tie_embeddings
    rewrite(whole, lm_head__weight=embedding + 1)
    refused(whole, "tie_word_embeddings=true contradicts lm_head.weight")
