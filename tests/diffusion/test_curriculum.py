from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_mega.config.data import Corpus
from llada_mega.config.training import (
    EmbeddingNoiseConfig,
    LearningRateConfig,
    ObjectiveConfig,
    StageConfig,
    StageObjectiveConfig,
)
from llada_mega.diffusion.curriculum import Curriculum, build_curriculum
from llada_mega.errors import CheckpointError, ConfigError


@dataclass
class Run:
    """What build_curriculum takes, with defaults that suit the tests."""

    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig(tokens=1000)])
    sequence_length: int = 10
    global_batch_size: int = 4
    base_lr: float = 1e-3
    min_lr: float = 0.0
    default_objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def build(self) -> Curriculum:
        return build_curriculum(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


def one_stage(tokens: int = 1000, *, lr: dict[str, Any] | None = None, **keys: Any) -> StageConfig:
    return StageConfig(tokens=tokens, lr=LearningRateConfig(**(lr or {})), **keys)


def three_stages() -> Run:
    return Run(
        [
            one_stage(95, name="warm-up", block_size=1, lr={"warmup_tokens": 40}),
            one_stage(200, name="stable", block_size=10, data=[Corpus("big/web", 2.0), Corpus("big/code")]),
            one_stage(400, name="decay", block_size=4, lr={"shape": "1-sqrt", "end": 0.1}, sequence_length=20),
        ]
    )


def test_boundaries_layouts_and_corpora() -> None:
    curriculum = three_stages().build()
    # 95 tokens: 10 samples of 10, up to 12; 200: 20; 400 in samples of 20: 20
    assert [(s.start_sample, s.end_sample) for s in curriculum.stages] == [(0, 12), (12, 32), (32, 52)]
    assert [s.layout for s in curriculum.stages] == ["bdlm", "mdlm", "bdlm"]
    assert [s.corpora for s in curriculum.stages] == [0, 1, 0]
    assert curriculum.corpora == ((), (("big/web", 2.0), ("big/code", 1.0)))
    assert [s.sequence_length for s in curriculum.stages] == [10, 10, 20]
    assert curriculum.total_samples == 52


def test_a_stage_of_its_own_objective() -> None:
    own = StageObjectiveConfig(weighting="uniform", schedule="cosine", t_min=0.3, t_max=0.8, level="block")
    curriculum = Run([one_stage(), one_stage(objective=own)]).build()
    default, special = (stage.objective for stage in curriculum.stages)
    assert dataclasses.asdict(default) == dataclasses.asdict(ObjectiveConfig())
    assert dataclasses.asdict(special) == dataclasses.asdict(own)
    built = special.build()
    assert (built.weighting, built.schedule.name) == ("uniform", "cosine")


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    sequence_length=st.integers(1, 300),
    global_batch_size=st.integers(1, 17),
)
def test_stages_tile_the_samples(tokens: list[int], sequence_length: int, global_batch_size: int) -> None:
    stages = [one_stage(count) for count in tokens]
    curriculum = Run(stages, sequence_length=sequence_length, global_batch_size=global_batch_size).build()
    expected_start = 0
    for stage, count in zip(curriculum.stages, tokens, strict=True):
        assert stage.start_sample == expected_start
        expected_start = stage.end_sample
        assert stage.num_samples % global_batch_size == 0
        surplus = stage.num_samples * sequence_length - count
        assert 0 <= surplus < sequence_length * global_batch_size
        assert curriculum.stage_at(stage.start_sample) is stage
        assert curriculum.stage_at(stage.end_sample - 1) is stage
    assert curriculum.stage_at(expected_start) is curriculum.stages[-1]
    assert curriculum.stage_at(10**9) is curriculum.stages[-1]


@pytest.mark.parametrize(
    ("shape", "halfway"),
    [
        ("constant", 0.8),
        ("linear", 0.5),
        ("cosine", 0.2 + 0.6 * 0.5 * (1 + math.cos(math.pi / 2))),
        ("1-sqrt", 0.2 + 0.6 * (1 - math.sqrt(0.5))),
    ],
)
def test_learning_rate_shapes(shape: str, halfway: float) -> None:
    end = 0.8 if shape == "constant" else 0.2
    lr = {"shape": shape, "start": 0.4, "peak": 0.8, "end": end, "warmup_tokens": 200}
    curriculum = Run([one_stage(1000, lr=lr)], base_lr=0.01).build()
    factors = [curriculum.learning_rate(consumed) / 0.01 for consumed in range(101)]
    assert factors[0] == pytest.approx(0.4)
    assert factors[10] == pytest.approx(0.6)  # halfway up the warm-up of 20 samples
    assert factors[20] == pytest.approx(0.8)
    assert factors[60] == pytest.approx(halfway)
    assert factors[100] == pytest.approx(end)
    assert curriculum.learning_rate(10**6) == pytest.approx(0.01 * end)
    assert factors[:21] == sorted(factors[:21])
    assert factors[20:] == sorted(factors[20:], reverse=True)


def test_learning_rate_floor() -> None:
    lr = {"shape": "linear", "end": 0.0, "warmup_tokens": 200}
    curriculum = Run([one_stage(1000, lr=lr)], base_lr=1.0, min_lr=0.25).build()
    rates = [curriculum.learning_rate(consumed) for consumed in range(101)]
    assert rates[0] == rates[100] == min(rates) == 0.25
    assert rates[20] == 1.0


def test_a_stage_may_be_all_warm_up() -> None:
    curriculum = Run([one_stage(1000, lr={"warmup_tokens": 1000, "shape": "linear", "end": 0.5}), one_stage()]).build()
    assert curriculum.learning_rate(99) == pytest.approx(0.99e-3)
    assert curriculum.learning_rate(100) == 1e-3


def test_embedding_noise_decays_over_stages_until_a_new_one_starts() -> None:
    noise = [EmbeddingNoiseConfig(None, 400), EmbeddingNoiseConfig(), EmbeddingNoiseConfig(0.5, 100)]
    curriculum = Run([one_stage(200, embedding_noise=one) for one in noise]).build()
    std = [
        curriculum.embedding_noise_std(consumed, default_std=0.2) for consumed in (0, 10, 20, 30, 39, 40, 45, 50, 999)
    ]
    assert std == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.005, 0.5, 0.25, 0.0, 0.0])


def test_no_noise_by_default() -> None:
    assert Run().build().embedding_noise_std(0, default_std=1.0) == 0.0


def test_json_round_trip_is_exact() -> None:
    run = three_stages()
    run.base_lr, run.min_lr = 0.1 + 0.2, 1e-7 / 3
    run.stages[0].embedding_noise = EmbeddingNoiseConfig(0.1 / 3, 77)
    curriculum = run.build()
    again = Curriculum.from_json(json.loads(json.dumps(curriculum.to_json())))
    assert again == curriculum and hash(again) == hash(curriculum)
    assert curriculum.difference(again) is None


@pytest.mark.parametrize("damage", ["missing", "unknown", "wrong"])
def test_damaged_json(damage: str) -> None:
    data = three_stages().build().to_json()
    if damage == "missing":
        del data["stages"][1]["lr"]
    elif damage == "unknown":
        data["stages"][1]["colour"] = 1
    else:
        data["stages"][1]["lr"] = 3
    with pytest.raises(CheckpointError, match=r"the curriculum saved in state\.json is damaged"):
        Curriculum.from_json(data)


CHANGES: dict[str, tuple[Any, str]] = {
    "base_lr": (2e-3, "optimizer.lr was 0.001 and is 0.002 now"),
    "min_lr": (1e-5, "optimizer.min_lr was 0.0 and is 1e-05 now"),
    "global_batch_size": (8, "trainer.global_batch_size was 4 and is 8 now"),
    "stages.1.block_size": (5, "curriculum.stages[1] (stable).block_size was 10 and is 5 now"),
    "stages.1.name": ("steady", "curriculum.stages[1] (stable).name was stable and is steady now"),
    "stages.1.tokens": (300, "curriculum.stages[1] (stable).tokens was 20 samples and is 32 samples now"),
    "stages.0.lr.warmup_tokens": (80, "curriculum.stages[0] (warm-up).lr.warmup_tokens was 4 samples and is 8 samples"),
    "stages.2.lr.end": (0.2, "curriculum.stages[2] (decay).lr.end was 0.1 and is 0.2 now"),
    "stages.2.tokens": (800, "curriculum.stages[2] (decay), the last, was lengthened from 20 to 40 samples"),
    "default_objective.t_min": (0.3, "curriculum.stages[0] (warm-up).objective.t_min was 0.0 and is 0.3 now"),
    "stages.0.embedding_noise.decay_tokens": (10, "curriculum.stages[0] (warm-up).embedding_noise.decay_tokens was 0"),
    "stages.1.data.0.weight": (3.0, "curriculum.stages[1] (stable).data was [('web', 2.0), ('code', 1.0)] and is"),
}


def set_path(target: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        target = target[int(parent)] if parent.isdigit() else getattr(target, parent)
    setattr(target, name, value)


@pytest.mark.parametrize("path", CHANGES)
def test_difference_names_stage_and_field(path: str) -> None:
    value, expected = CHANGES[path]
    changed = three_stages()
    set_path(changed, path, value)
    message = three_stages().build().difference(changed.build())
    assert message is not None and message.startswith(expected)


def test_difference_of_added_and_removed_stages() -> None:
    short, long = three_stages(), three_stages()
    long.stages.append(one_stage(100, name="extra"))
    assert short.build().difference(long.build()) == "curriculum.stages[3] (extra) was appended"
    assert long.build().difference(short.build()) == "curriculum.stages[3] (extra) was removed"


def test_a_shorter_last_stage_is_a_plain_change() -> None:
    changed = three_stages()
    changed.stages[2].tokens = 300
    message = three_stages().build().difference(changed.build())
    assert message == "curriculum.stages[2] (decay).tokens was 20 samples and is 16 samples now"


def test_moved_corpora_are_the_same_corpora() -> None:
    moved = three_stages()
    moved.stages[1].data = [Corpus("/elsewhere/web", 2.0), Corpus("/elsewhere/code")]
    assert three_stages().build().difference(moved.build()) is None


BAD_VALUES: dict[str, Any] = {
    "stages.1.block_size": 0,
    "stages.1.tokens": 0,
    "stages.1.sequence_length": 0,
    "stages.1.lr.shape": "wsd",
    "stages.1.lr.start": -0.1,
    "stages.1.lr.peak": math.inf,
    "stages.1.lr.end": math.nan,
    "stages.1.lr.warmup_tokens": 1001,
    "stages.1.embedding_noise.decay_tokens": -1,
    "stages.1.embedding_noise.std": -0.5,
    "stages.1.objective.weighting": "flat",
    "stages.1.objective.schedule": "square",
    "stages.1.objective.level": "token",
    "stages.1.objective.t_max": 1.5,
    "stages.1.data.0.weight": 0.0,
}


@pytest.mark.parametrize("path", BAD_VALUES)
def test_bad_stage_values_name_their_key(path: str) -> None:
    run = Run([one_stage(), one_stage(objective=StageObjectiveConfig(), data=[Corpus("web")])])
    set_path(run, path, BAD_VALUES[path])
    key = "curriculum." + path.replace(".1.", "[1].").replace(".0.", "[0].")
    with pytest.raises(ConfigError) as caught:
        run.build()
    assert f"{key}={BAD_VALUES[path]}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stages": []}, "curriculum.stages is empty"),
        ({"global_batch_size": 0}, "trainer.global_batch_size=0"),
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"base_lr": 0.0}, "optimizer.lr=0.0"),
        ({"min_lr": 1.0}, "optimizer.min_lr=1.0"),
        ({"default_objective": ObjectiveConfig(schedule="square")}, "objective.schedule=square"),
        ({"stages": [one_stage(data=[])]}, "curriculum.stages[0].data is empty"),
        ({"stages": [one_stage(lr={"end": 0.1})]}, "curriculum.stages[0].lr.end=0.1 has no effect with shape=constant"),
    ],
)
def test_bad_run_values(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(Run(), **keys).build()
    assert str(caught.value).startswith(message)
