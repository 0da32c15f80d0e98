"""The average of checkpoints: of which ones, with which weights, and what comes out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import llada_mega
from llada_mega.checkpoint.checkpoint import read_model_config, read_state, verify
from llada_mega.checkpoint.convert import export_model, import_model
from llada_mega.checkpoint.merge import DECAYS, best_checkpoints, merge_checkpoints, merge_weights, rank_checkpoints
from llada_mega.errors import CheckpointError
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


def test_other_models_are_refused(parents: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path) -> None:
    save_ling(tmp_path / "other", routed_scaling_factor=1.5)
    import_model(tmp_path / "other", tmp_path / "x", mask_token_id=MASK)
    with pytest.raises(CheckpointError, match="different models: moe"):
        merge_checkpoints([parents[0][0], tmp_path / "x"], tmp_path / "merged")
    save_ling(tmp_path / "wide", torch.float32)
    import_model(tmp_path / "wide", tmp_path / "w", mask_token_id=MASK)
    with pytest.raises(CheckpointError, match="several dtypes"):
        merge_checkpoints([parents[0][0], tmp_path / "w"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints hold nothing but states: two stages, six steps, one not validated."""
    from llada_mega.checkpoint.directory import NewDirectory
    from llada_mega.checkpoint.save import seal
    from llada_mega.config.model import ModelConfig

    root = tmp_path_factory.mktemp("run")
    stages = [
        {"name": "grow", "start_sample": 0, "end_sample": 8},
        {"name": "decay", "start_sample": 8, "end_sample": 24},
    ]
    scores = {1: 9.0, 2: 1.0, 3: 5.0, 4: 4.0, 5: None, 6: 4.5}
    for step, score in scores.items():
        new = NewDirectory(root / "checkpoints" / f"step_{step:08d}")
        new.start()
        metrics = {} if score is None else {"valid/block_8/nll_bound": score, "valid/block_8/accuracy": score / 10}
        state = {"train": {"step": step, "consumed_samples": 4 * step}, "metrics": metrics, "curriculum": stages}
        seal(new, ModelConfig(), state, 0)
    return root


@pytest.fixture(autouse=True)
def plain_curriculum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the curriculum only names and boundaries count here."""

    class Stage:
        def __init__(self, fields: dict[str, Any]) -> None:
            self.__dict__ |= fields

    class Plain:
        def __init__(self, stages: list[dict[str, Any]]) -> None:
            self.stages = [Stage(fields) for fields in stages]

        @classmethod
        def from_json(cls, stages: list[dict[str, Any]]) -> Plain:
            return cls(stages)

        def stage_at(self, sample: int) -> Any:
            return next(stage for stage in self.stages if stage.start_sample <= sample < stage.end_sample)

    monkeypatch.setattr("llada_mega.checkpoint.merge.Curriculum", Plain)


def test_candidates_come_from_the_last_stage_best_first(run: Path) -> None:
    ranked = rank_checkpoints(run, "valid/block_8/nll_bound")
    assert [(c.step, c.score) for c in ranked] == [(4, 4.0), (6, 4.5), (3, 5.0)]
    assert [c.step for c in rank_checkpoints(run, "valid/block_8/nll_bound", "all")] == [2, 4, 6, 3, 1]
    assert [c.step for c in rank_checkpoints(run, "valid/block_8/nll_bound", "grow")] == [2, 1]
    assert [c.step for c in rank_checkpoints(run, "valid/block_8/accuracy")] == [3, 6, 4]
    assert [c.step for c in best_checkpoints(run, 2, "valid/block_8/nll_bound")] == [4, 6]


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
