"""Hugging Face -> checkpoint -> Hugging Face, through the Megatron-Core model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llada_mega
from llada_mega.checkpoint.checkpoint import read_model_config, verify
from llada_mega.checkpoint.convert import export_model, import_model
from llada_mega.checkpoint.hf import import_hf
from llada_mega.checkpoint.storage import sha256
from llada_mega.errors import CheckpointError, ConfigError
from tests.checkpoint.resharding import reshard
from tests.checkpoint.tiny import FAMILIES, save_model
from tests.parallel.harness import run_ranks

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_bit_and_adds_one_row(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    theirs = save_model(tmp_path / "in", family, dtype=dtype)
    import_model(tmp_path / "in", tmp_path / "checkpoint")
    assert verify(tmp_path / "checkpoint") == []
    export_model(tmp_path / "checkpoint", tmp_path / "out", block_size=8)
    source = import_hf(tmp_path / "out")
    assert source.dtype == dtype
    for name, tensor in theirs.state_dict().items():
        if name in source.state():
            assert torch.equal(source.read(name)[: len(tensor)], tensor), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["mask_token_id"], config["block_size"], config["vocab_size"]) == (300, 8, 301)

    # What came out goes in again unchanged: it has its MASK token now.
    import_model(tmp_path / "out", tmp_path / "again")
    assert read_model_config(tmp_path / "again") == read_model_config(tmp_path / "checkpoint")
    export_model(tmp_path / "again", tmp_path / "out2", block_size=8)
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "second"), [((2, 1), (1, 2)), ((1, 2), (2, 2)), ((2, 2), (2, 1))])
def test_through_two_layouts(tmp_path: Path, family: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Load and save under (TP, PP), then under another: not a bit changes. Experts are split over the TP ranks."""
    save_model(tmp_path / "in", family, dtype=torch.bfloat16)
    import_model(tmp_path / "in", tmp_path / "0")
    export_model(tmp_path / "0", tmp_path / "direct")
    ep = 2 if family.endswith("moe") else 1
    for step, (tp, pp) in enumerate((first, second)):
        places = {"source": str(tmp_path / f"{step}"), "target": str(tmp_path / f"{step + 1}")}
        run_ranks(reshard, max(tp, ep) * pp, **places, tp=tp, pp=pp, ep=ep)
    export_model(tmp_path / "2", tmp_path / "out")
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(tmp_path / "direct" / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_model_gives_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    theirs = save_model(tmp_path / "in", family)
    import_model(tmp_path / "in", tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out", max_shard_size="50KB")
    token_ids = torch.randint(3, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(token_ids).logits
    for name in ("in", "checkpoint", "out"):
        model = llada_mega.load_model(tmp_path / name)
        logits = model.logits(token_ids, layout="ar")
        assert logits.dtype == torch.float32 and logits.shape == (2, 33, 300 if name == "in" else 301)
        assert float((logits[..., :300] - expected).abs().max() / expected.abs().max()) < 1e-5
        assert model.tokenizer is not None and model.tokenizer.decode(model.tokenizer.encode("abba")) == "abba"
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(exported(token_ids).logits[..., :300], expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_models_give_float32_logits(tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "in")
    token_ids = torch.arange(40)[None]
    model = llada_mega.load_model(tmp_path / "in", dtype="bfloat16")
    assert next(model.model.parameters()).dtype == torch.bfloat16
    logits = model.logits(token_ids, layout="ar")
    with torch.no_grad():
        expected = theirs(token_ids).logits
    assert logits.dtype == torch.float32
    assert 1e-4 < float((logits - expected).abs().max() / expected.abs().max()) < 0.1


def test_dtype_can_be_chosen(tmp_path: Path) -> None:
    save_model(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "checkpoint", dtype="bfloat16")
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    assert import_hf(tmp_path / "out").dtype == torch.bfloat16
    export_model(tmp_path / "checkpoint", tmp_path / "wide", dtype="float32")
    assert import_hf(tmp_path / "wide").dtype == torch.float32
    with pytest.raises(CheckpointError, match="dtype=int8"):
        export_model(tmp_path / "checkpoint", tmp_path / "other", dtype="int8")


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    save_model(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        import_model(tmp_path / "in", tmp_path / "checkpoint")
    import_model(tmp_path / "in", tmp_path / "checkpoint", overwrite=True)
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not empty"):
        export_model(tmp_path / "checkpoint", tmp_path / "out")
    export_model(tmp_path / "checkpoint", tmp_path / "out", block_size=4, overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["block_size"] == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for convert, source in ((import_model, "in"), (export_model, "checkpoint")):
        with pytest.raises(CheckpointError, match="not empty"):
            convert(tmp_path / source, tmp_path / "mine", overwrite=True)  # type: ignore[operator]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "in")
    (tmp_path / "in/model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        import_model(tmp_path / "in", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_load_model_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        llada_mega.load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        llada_mega.load_model(tmp_path / "empty")
    save_model(tmp_path / "in", size=310)
    with pytest.raises(CheckpointError, match="tokenizer has 310 tokens, the model 300"):
        llada_mega.load_model(tmp_path / "in")
    with pytest.raises(ConfigError, match="dtype=int8"):
        llada_mega.load_model(tmp_path / "in", dtype="int8")
    with pytest.raises(ConfigError, match="device=tpu9"):
        llada_mega.load_model(tmp_path / "in", device="tpu9")
