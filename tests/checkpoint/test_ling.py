"""Ling in, LLaDA2 out: every tensor bit for bit, under every layout, whole or in stacked experts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llada_mega
from llada_mega.checkpoint.checkpoint import read_model_config, verify
from llada_mega.checkpoint.convert import export_model, import_model, verify_model
from llada_mega.checkpoint.hf import import_hf
from llada_mega.errors import CheckpointError
from tests.checkpoint.ling import CONFIG, save_ling
from tests.checkpoint.resharding import reshard
from tests.models import reference
from tests.parallel.harness import run_ranks

MASK = 300
LAYOUTS = list(itertools.product((1, 2), repeat=3))  # TP, PP, EP


def read_all(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def ling(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    return tmp_path / "in", save_ling(tmp_path / "in", request.param, prediction_layers=True)


def test_there_and_back(ling: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    directory, tensors = ling
    notes = import_model(directory, tmp_path / "checkpoint", mask_token_id=MASK)
    assert notes == ["left out: a layer for multi-token prediction"]
    assert verify(tmp_path / "checkpoint") == []
    for shard_size in ("5GB", "40KB"):
        out = tmp_path / f"out_{shard_size}"
        export_model(tmp_path / "checkpoint", out, max_shard_size=shard_size)
        assert_equal(read_all(out), tensors)
        assert verify_model(out) == (out, [])
        content = json.loads((out / "config.json").read_text())
        for key in CONFIG.keys() & content.keys() - {"architectures", "model_type", "torch_dtype"}:
            assert content[key] == CONFIG[key], key
        assert content["model_type"] == "llada2_moe" and content["mask_token_id"] == MASK
        generation = json.loads((out / "generation_config.json").read_text())
        assert (generation["block_length"], generation["threshold"]) == (32, 0.95)
    import_model(out, tmp_path / "again")
    assert read_model_config(tmp_path / "again") == read_model_config(tmp_path / "checkpoint")


def test_stacked_experts_and_back(ling: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    directory, tensors = ling
    import_model(directory, tmp_path / "checkpoint", mask_token_id=MASK)
    export_model(tmp_path / "checkpoint", tmp_path / "stacked", experts="stacked", max_shard_size="40KB")
    stacked = read_all(tmp_path / "stacked")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        experts = [tensors[f"model.layers.2.mlp.experts.{e}.{projection}.weight"] for e in range(16)]
        assert torch.equal(stacked[f"model.layers.2.mlp.experts.{projection}"], torch.stack(experts))
    assert not any(".experts.3." in name for name in stacked)
    assert json.loads((tmp_path / "stacked/config.json").read_text())["model_type"] == "llada2_moe_veomni"
    import_model(tmp_path / "stacked", tmp_path / "again")
    export_model(tmp_path / "again", tmp_path / "separate")
    assert_equal(read_all(tmp_path / "separate"), tensors)


@pytest.mark.parametrize("first", LAYOUTS, ids=lambda layout: "tp{}-pp{}-ep{}".format(*layout))
def test_through_two_layouts(tmp_path: Path, first: tuple[int, int, int]) -> None:
    """Import, load and save under one layout, load and save under another, export: not a bit changes."""
    tensors = save_ling(tmp_path / "in", torch.bfloat16)
    import_model(tmp_path / "in", tmp_path / "0", mask_token_id=MASK)
    second = LAYOUTS[(LAYOUTS.index(first) + 3) % len(LAYOUTS)]
    for step, (tp, pp, ep) in enumerate((first, second)):
        ranks = max(tp, ep) * pp
        run_ranks(
            reshard, ranks, source=str(tmp_path / f"{step}"), target=str(tmp_path / f"{step + 1}"), tp=tp, pp=pp, ep=ep
        )
    export_model(tmp_path / "2", tmp_path / "out")
    assert_equal(read_all(tmp_path / "out"), tensors)


def test_processes_share_the_work(tmp_path: Path) -> None:
    tensors = save_ling(tmp_path / "in", torch.bfloat16)
    places = {"source": str(tmp_path / "in"), "checkpoint": str(tmp_path / "c"), "exported": str(tmp_path / "out")}
    written = run_ranks("tests.checkpoint.resharding:convert_both_ways", 3, **places, mask_token_id=MASK)
    assert verify(tmp_path / "c") == [] and verify_model(tmp_path / "out")[1] == []
    assert_equal(read_all(tmp_path / "out"), tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(written) == 2 * size and min(written) > size / 4


@pytest.mark.parametrize(
    ("layout", "documents"), [("ar", [24]), ("mdlm", [24]), ("ar", [9, 15]), ("mdlm", [9, 15]), ("bdlm", [9, 15])]
)
def test_logits_after_import_equal_plain_pytorch(tmp_path: Path, layout: str, documents: list[int]) -> None:
    """Causal, bidirectional, several documents, [noisy ; clean], against layers and routing in plain PyTorch."""
    tensors = save_ling(tmp_path / "in", torch.float32)
    import_model(tmp_path / "in", tmp_path / "checkpoint", mask_token_id=MASK)
    model = llada_mega.load_model(tmp_path / "checkpoint")
    length = sum(documents) * (2 if layout == "bdlm" else 1)
    ids = torch.randint(3, MASK, (1, length), generator=torch.Generator().manual_seed(5))
    ids[:, : length // 2 : 3] = MASK
    position = reference.positions(documents)[None]
    document = torch.repeat_interleave(torch.tensor(documents))
    mask = document[:, None] == document[None, :]
    if layout == "ar":
        mask = mask.tril()
    if layout == "bdlm":
        mask, position = reference.equation_3(documents, 4), position.repeat(1, 2)
    expected = reference.logits(ids, position, mask, tensors, read_model_config(tmp_path / "checkpoint"))
    found = model.logits(ids, layout=layout, block_size=4, document_lengths=[documents])
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 5}, "model.layers.4."),
        ({"num_experts": 8, "num_experts_per_tok": 4}, "gate.weight has shape (16, 48)"),
        ({"moe_intermediate_size": 40}, "experts.0.gate_proj.weight has shape (24, 48)"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, changes: dict[str, int], named: str) -> None:
    save_ling(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(CONFIG | changes))
    with pytest.raises(CheckpointError) as caught:
        import_hf(tmp_path / "in")
    assert named in str(caught.value)


def test_layers_that_the_config_does_not_announce_are_refused(tmp_path: Path) -> None:
    save_ling(tmp_path / "in", prediction_layers=True, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.\S+ has no place"):
        import_hf(tmp_path / "in")


def test_the_mask_token_must_be_known(tmp_path: Path) -> None:
    save_ling(tmp_path / "in")
    with pytest.raises(CheckpointError, match="give mask_token_id="):
        import_model(tmp_path / "in", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="mask_token_id=301 is outside"):
        import_model(tmp_path / "in", tmp_path / "checkpoint", mask_token_id=301)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_damage_to_an_export_is_named(tmp_path: Path) -> None:
    save_ling(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "checkpoint", mask_token_id=MASK)
    export_model(tmp_path / "checkpoint", tmp_path / "out", max_shard_size="40KB")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    (tmp_path / "out" / "config.json").unlink()
    assert verify_model(tmp_path / "out")[1] == [
        "config.json is missing",
        f"{shard.name} has another checksum than when it was written",
    ]
    (tmp_path / "out" / "SHA256SUMS").write_text("")
    assert f"{shard.name} is not listed in SHA256SUMS" in verify_model(tmp_path / "out")[1]


def test_only_an_export_is_overwritten(tmp_path: Path) -> None:
    tensors = save_ling(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "checkpoint", mask_token_id=MASK)
    with pytest.raises(CheckpointError, match="in exists and is not empty"):
        export_model(tmp_path / "checkpoint", tmp_path / "in", overwrite=True)
    assert_equal(read_all(tmp_path / "in"), tensors)
