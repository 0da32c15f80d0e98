"""Whatever happened to a file of a checkpoint, ``verify`` names it; nothing in it is ever executed."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

import llada_mega
from llada_mega.checkpoint.checkpoint import is_complete, verify
from llada_mega.checkpoint.convert import import_model
from llada_mega.errors import CheckpointError
from tests.checkpoint.ling import save_ling

MASK = 300


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of the same shape, in several parts."""
    root = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llada_mega.checkpoint.weights.PART_BYTES", 100_000)
        for seed in range(2):
            save_ling(root / f"hf{seed}", torch.float32, seed=seed)
            import_model(root / f"hf{seed}", root / f"{seed}", mask_token_id=MASK)
    return root


def files(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "of another model"])
def test_every_file_is_checked(originals: Path, tmp_path: Path, damage: str) -> None:
    draw = random.Random(damage)
    names = files(originals / "0")
    assert len([name for name in names if name.suffix == ".safetensors"]) >= 4
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(originals / "0", copy)
        content = bytearray((copy / name).read_bytes())
        if damage == "truncated":
            (copy / name).write_bytes(content[: draw.randrange(len(content))])
        elif damage == "flipped":
            place = draw.randrange(len(content))
            while chr(content[place]).isspace():  # between values of JSON a space is as good as a tab
                place = draw.randrange(len(content))
            content[place] ^= 1 << draw.randrange(8)
            (copy / name).write_bytes(content)
        elif damage == "gone":
            (copy / name).unlink()
        elif (originals / "1" / name).read_bytes() == content:
            shutil.rmtree(copy)
            continue
        else:
            shutil.copyfile(originals / "1" / name, copy / name)
        problems = verify(copy)
        if name.name == "COMPLETE":  # what it says of itself, or of others, is wrong
            assert problems
        else:
            assert any(str(name) in problem for problem in problems), (name, problems)
        if damage != "flipped" and damage != "of another model":
            assert not is_complete(copy) or name.suffix == ".json"
        shutil.rmtree(copy)
    assert verify(originals / "0") == []


def test_pickles_are_not_read(originals: Path, tmp_path: Path) -> None:
    """torch's distributed checkpoints keep their index in a pickle; one that is put here stays what it is, a file."""
    canary = tmp_path / "executed"

    class Touch:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (canary,)

    hostile = pickle.dumps(Touch())
    pickle.loads(hostile)
    assert canary.exists()
    canary.unlink()

    beside = tmp_path / "beside"
    shutil.copytree(originals / "0", beside)
    for folder in (beside, beside / "tensors"):
        (folder / ".metadata").write_bytes(hostile)
    assert llada_mega.load_model(beside).config.vocab_size == 301

    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / ".metadata").write_bytes(hostile)
    (tmp_path / "alone" / "pytorch_model.bin").write_bytes(hostile)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        llada_mega.load_model(tmp_path / "alone")
    (tmp_path / "alone" / "config.json").write_text((originals / "hf0" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        llada_mega.load_model(tmp_path / "alone")
    assert not canary.exists()
