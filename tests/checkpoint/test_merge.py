"""The average of checkpoints: of which ones, with which weights, and what comes out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import llada_mega
from llada_mega.checkpoint.checkpoint import list_checkpoints, read_model_config, read_state, verify
from llada_mega.checkpoint.convert import export_model, import_model
from llada_mega.checkpoint.directory import NewDirectory
from llada_mega.checkpoint.merge import DECAYS, best_checkpoints, merge_checkpoints, merge_weights, rank_checkpoints
from llada_mega.checkpoint.save import seal
from llada_mega.checkpoint.storage import ShardReader
from llada_mega.config.compose import compose
from llada_mega.config.curriculum import curriculum_of
from llada_mega.config.model import ModelConfig
from llada_mega.config.schema import Config
from llada_mega.config.training import CheckpointConfig
from llada_mega.errors import CheckpointError
from llada_mega.training.callbacks.checkpointing import prune
from tests.checkpoint.ling import save_ling
from tests.checkpoint.resharding import reshard
from tests.checkpoint.test_ling import read_all
from tests.parallel.harness import run_ranks

MASK = 300


@pytest.mark.parametrize("kind", ["uniform", *DECAYS])
@given(count=st.integers(1, 12))
def test_weights_add_up_to_one_and_none_is_negative(kind: str, count: int) -> None:
    weights = merge_weights(kind, count)
    assert len(weights) == count and math.fsum(weights) == pytest.approx(1) and min(weights) >= 0


@pytest.mark.parametrize("kind", DECAYS)
def test_the_average_is_the_first_checkpoint_plus_decayed_updates(kind: str) -> None:
    """What makes an average stand in for a decay: SGD with and without it, on constant gradients of each interval."""
    updates = [3.0, -1.0, 4.0, 1.5]
    points = numpy.cumsum([10.0, *updates])
    average = float(numpy.dot(merge_weights(kind, len(points)), points))
    decayed = 10.0 + sum(update * DECAYS[kind]((i + 0.5) / len(updates)) for i, update in enumerate(updates))
    assert average == pytest.approx(decayed)


def test_given_weights() -> None:
    assert merge_weights([1, 3], 2) == [0.25, 0.75]
    for wrong in ([1.0], [1.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(CheckpointError, match="must be 2 numbers"):
            merge_weights(wrong, 2)
    with pytest.raises(CheckpointError, match="weights=ema is unknown; use uniform, linear"):
        merge_weights("ema", 2)


@pytest.fixture
def parents(tmp_path: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Three checkpoints of one MoE, one of them saved by TP2 x PP2 (its vocabulary has other padding)."""
    tensors = []
    for index in range(3):
        tensors.append(save_ling(tmp_path / f"hf{index}", torch.bfloat16, seed=index))
        import_model(tmp_path / f"hf{index}", tmp_path / f"{index}", mask_token_id=MASK)
    run_ranks(reshard, 4, source=str(tmp_path / "1"), target=str(tmp_path / "1t"), tp=2, pp=2, ep=2)
    return [tmp_path / "0", tmp_path / "1t", tmp_path / "2"], tensors


@pytest.mark.parametrize("weights", ["uniform", [0.2, 0.5, 0.3]])
def test_equals_numpy(parents: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path, weights: Any) -> None:
    paths, tensors = parents
    merge_checkpoints(paths, tmp_path / "merged", weights=weights)
    assert verify(tmp_path / "merged") == []
    assert read_model_config(tmp_path / "merged") == read_model_config(paths[0])
    export_model(tmp_path / "merged", tmp_path / "out")
    shares = [1 / 3] * 3 if weights == "uniform" else weights
    for name, found in read_all(tmp_path / "out").items():
        parts = [parent[name].double().numpy() for parent in tensors]
        expected = sum(share * part for share, part in zip(shares, parts, strict=True))
        assert found.dtype == tensors[0][name].dtype  # biases of experts in float32 among them
        rounded = torch.from_numpy(expected).to(found.dtype)
        # Where the average lies in the middle between two numbers, either is right.
        error, least = (abs(values.double().numpy() - expected).max() for values in (found, rounded))
        assert error <= least * (1 + 1e-6), name
    assert read_state(tmp_path / "merged")["merged"]["weights"] == pytest.approx(shares)
    assert llada_mega.load_model(tmp_path / "merged").config.mask_token_id == MASK


def test_a_merge_of_other_bytes_under_the_same_paths_starts_again(
    parents: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = parents

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llada_mega.checkpoint.save.seal", stop)  # all files are written, nothing has its name
        merge_checkpoints(paths[:2], tmp_path / "merged")
    save_ling(tmp_path / "retrained", seed=7)
    import_model(tmp_path / "retrained", paths[0], mask_token_id=MASK, overwrite=True)
    merge_checkpoints(paths[:2], tmp_path / "merged")
    merge_checkpoints(paths[:2], tmp_path / "fresh")
    merged, fresh = ShardReader(tmp_path / "merged"), ShardReader(tmp_path / "fresh")
    for key in fresh.index:
        assert torch.equal(merged.read_whole(key), fresh.read_whole(key)), key


def test_other_models_are_refused(parents: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path) -> None:
    save_ling(tmp_path / "other", routed_scaling_factor=1.5)
    import_model(tmp_path / "other", tmp_path / "x", mask_token_id=MASK)
    with pytest.raises(CheckpointError, match="different models: model.moe.routed_scaling_factor is 2.5 and 1.5"):
        merge_checkpoints([parents[0][0], tmp_path / "x"], tmp_path / "merged")
    save_ling(tmp_path / "wide", torch.float32)
    import_model(tmp_path / "wide", tmp_path / "w", mask_token_id=MASK)
    with pytest.raises(CheckpointError, match="several dtypes"):
        merge_checkpoints([parents[0][0], tmp_path / "w"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints hold nothing but states: two steps in one stage, four in the next, one not validated."""
    root = tmp_path_factory.mktemp("run")
    stages = "curriculum.stages=[{name: grow, block_size: 4, tokens: 512}, {name: decay, block_size: 8, tokens: 1024}]"
    overrides = ["data.sequence_length=64", "trainer.global_batch_size=4", "data.train=[{path: x}]", stages]
    curriculum = curriculum_of(compose(Config, overrides)).to_json()
    assert [stage["end_sample"] for stage in curriculum["stages"]] == [8, 24]
    for step, score in {1: 9.0, 2: 1.0, 3: 5.0, 4: 4.0, 5: None, 6: 4.5}.items():
        new = NewDirectory(root / "checkpoints" / f"step_{step:08d}")
        new.start()
        metrics = {} if score is None else {"valid/block_8/nll_bound": score, "valid/block_8/accuracy": score / 10}
        state = {"train": {"step": step, "consumed_samples": 4 * step}, "metrics": metrics, "curriculum": curriculum}
        seal(new, ModelConfig(), state)
    return root


def test_candidates_come_from_the_last_stage_best_first(run: Path) -> None:
    ranked = rank_checkpoints(run, "valid/block_8/nll_bound")
    assert [(c.step, c.score) for c in ranked] == [(4, 4.0), (6, 4.5), (3, 5.0)]
    assert [c.step for c in rank_checkpoints(run, "valid/block_8/nll_bound", "all")] == [2, 4, 6, 3, 1]
    assert [c.step for c in rank_checkpoints(run, "valid/block_8/nll_bound", "grow")] == [2, 1]
    assert [c.step for c in rank_checkpoints(run, "valid/block_8/accuracy")] == [3, 6, 4]
    assert [c.step for c in best_checkpoints(run, 2, "valid/block_8/nll_bound")] == [4, 6]


def test_what_is_to_be_merged_is_not_pruned(run: Path, tmp_path: Path) -> None:
    """The best of the stage that goes on are kept, though an earlier stage had better ones."""
    shutil.copytree(run, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    options = {"keep_last": 1, "keep_best": 2, "best_metric": "valid/block_8/nll_bound"}
    prune(root, CheckpointConfig(**options, merge_at_end=3))
    assert [int(path.name[-1]) for path in list_checkpoints(root)] == [2, 3, 4, 6]
    prune(root, CheckpointConfig(**options))
    assert [int(path.name[-1]) for path in list_checkpoints(root)] == [2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, "valid/block_8/nll_bound"), "k=4 checkpoints cannot be merged: stage=last has 3"),
        ((0, "valid/block_8/nll_bound"), "k=0 checkpoints cannot"),
        (
            (2, "valid/block_32/nll_bound"),
            "has metric=valid/block_32/nll_bound; the checkpoints have valid/block_8/acc",
        ),
        ((2, "valid/block_8/nll_bound", "middle"), "stage=middle is no stage of .*use last, all, grow, decay"),
    ],
)
def test_what_cannot_be_chosen(run: Path, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        best_checkpoints(run, *arguments)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        best_checkpoints(run.parent / "nothing", 2, "x")
