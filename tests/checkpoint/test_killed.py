"""Killed at random moments: what is there is the old or the new one, complete, and the same command goes on."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llada_mega.checkpoint.checkpoint import load_model_weights, model_state, read_model_config
from llada_mega.checkpoint.convert import export_model, import_model, open_source, verify_model
from llada_mega.checkpoint.directory import NewDirectory, recover
from llada_mega.checkpoint.merge import merge_checkpoints
from llada_mega.checkpoint.save import CheckpointWrite
from llada_mega.checkpoint.storage import sha256
from llada_mega.errors import CheckpointError
from llada_mega.models import build_model
from tests.checkpoint.ling import save_ling

KILLS = 20
MASK = 300
Operation = Callable[[Path, int], None]  # (output, variant)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, as Hugging Face directories ``hf0``, ``hf1`` and as checkpoints ``0``, ``1``."""
    root = tmp_path_factory.mktemp("sources")
    for variant in range(2):
        save_ling(root / f"hf{variant}", seed=variant)
        import_model(root / f"hf{variant}", root / f"{variant}", mask_token_id=MASK)
    return root


def operations(sources: Path) -> dict[str, Operation]:
    def convert(output: Path, variant: int) -> None:
        import_model(sources / f"hf{variant}", output, mask_token_id=MASK, overwrite=True)

    def export(output: Path, variant: int) -> None:
        export_model(sources / f"{variant}", output, max_shard_size="100KB", overwrite=True)

    def merge(output: Path, variant: int) -> None:
        merge_checkpoints([sources / "0", sources / "1"], output, weights=[1 + variant, 1], overwrite=True)

    def save(output: Path, variant: int) -> None:
        config = read_model_config(sources / f"{variant}")
        model = build_model(config, dtype=torch.bfloat16, seed=None)
        load_model_weights(sources / f"{variant}", model)
        write = CheckpointWrite(output)
        write.start({"model": model_state([model])})
        write.write()
        write.finish(config, {})

    return {"import": convert, "export": export, "merge": merge, "save": save}


def fingerprint(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {str(path.relative_to(directory)): sha256(path) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import", "export", "merge", "save"])
def test_either_the_old_or_the_new_one(sources: Path, tmp_path: Path, name: str) -> None:
    operation = operations(sources)[name]
    expected, seconds = [], 0.0
    for variant in range(2):
        began = time.perf_counter()
        operation(tmp_path / f"whole{variant}", variant)
        seconds = time.perf_counter() - began
        expected.append(fingerprint(tmp_path / f"whole{variant}"))
    assert expected[0] != expected[1]
    output = tmp_path / "output"
    operation(output, 0)
    draw, current, kills = random.Random(name), 0, 0
    while kills < KILLS:
        process = multiprocessing.get_context("fork").Process(target=operation, args=(output, 1 - current))
        process.start()
        assert process.pid is not None
        time.sleep(draw.uniform(0, 1.3 * seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        recover(output)
        found = fingerprint(output)
        assert found in expected and verify_model(output)[1] == []
        current = expected.index(found)
        if kills % 4 == 0:  # and now and then it is allowed to finish what was begun
            operation(output, 1 - current)
            current = 1 - current
            assert fingerprint(output) == expected[current]
    left = {path.name for path in tmp_path.iterdir()} - {"output", "whole0", "whole1"}
    assert left <= {".output.partial", ".output.replaced"}


def test_a_conversion_goes_on_where_it_was_killed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished files are not written again, unless the source or an option has changed."""
    monkeypatch.setattr("llada_mega.checkpoint.weights.PART_BYTES", 20_000)
    import_model(sources / "hf0", tmp_path / "whole", mask_token_id=MASK)
    made: list[str] = []
    read = open_source(sources / "hf0").read

    class PowerCut(BaseException):
        pass

    def interrupted(name: str) -> torch.Tensor:
        made.append(name)
        if len(made) == 43:
            raise PowerCut
        return read(name)

    def convert(directory: Path, **options: str) -> None:
        def open_counting(path: Path, cache: Path | None = None) -> object:
            return dataclasses.replace(open_source(path), read=interrupted)

        with monkeypatch.context() as patch:
            patch.setattr("llada_mega.checkpoint.convert.open_source", open_counting)
            import_model(directory, tmp_path / "out", mask_token_id=MASK, **options)

    with pytest.raises(PowerCut):
        convert(sources / "hf0")
    assert not (tmp_path / "out").exists()
    first = set(made[:-1])
    del made[:]
    made += [""] * 43  # no second power cut
    convert(sources / "hf0")
    again = first & set(made)
    assert 0 < len(again) < len(first)  # of the file that was being written, and no other
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")

    with pytest.raises(PowerCut):
        del made[:]
        convert(sources / "hf0", dtype="float16", overwrite=True)  # type: ignore[arg-type]
    made += [""] * 43
    convert(sources / "hf0", overwrite=True)  # type: ignore[arg-type]
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")


def test_a_process_that_dies_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    new = NewDirectory(output)
    new.start()
    (new.partial / "new").touch()
    rename = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target == output:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", die)
        new.publish()
    assert not output.exists()
    recover(output)
    assert [path.name for path in output.iterdir()] == ["old"]


def test_a_full_disk_is_told_before_anything_is_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="are to be written, the disk has 0.00 GiB free"):
        export_model(sources / "0", tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))
