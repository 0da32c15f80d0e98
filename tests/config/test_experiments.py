"""Every experiment composes, validates, and says what the report says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llada_mega.config.compose import compose, config_directory, config_groups
from llada_mega.config.count import active_parameters, embedding_parameters, total_parameters
from llada_mega.config.model import ModelConfig
from llada_mega.config.reference import walk
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = config_groups()["experiment"]


def model(name: str) -> ModelConfig:
    return compose(Config, [f"model={name}"]).model


def test_the_promised_experiments_are_there() -> None:
    assert {"quickstart", "quickstart_moe", "cpt_16b", "cpt_100b"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose_and_validate(experiment: str) -> None:
    validate(compose(Config, [f"experiment={experiment}"]))


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g, choices in config_groups().items() for c in choices])
def test_every_choice_of_every_group_composes(group: str, choice: str) -> None:
    compose(Config, [f"{group}={choice}"])


@pytest.mark.parametrize("experiment", ["cpt_16b", "cpt_100b"])
def test_the_curriculum_is_the_published_one(experiment: str) -> None:
    config = compose(Config, [f"experiment={experiment}"])
    blocks = [stage.block_size for stage in config.curriculum.stages]
    assert blocks[:5] == [1, 4, 32, 64, 4096]
    assert blocks[5] == config.data.sequence_length == 4096
    assert blocks[6:] == [2048, 1024, 512, 256, 128, 64, 32]


@pytest.mark.parametrize("experiment", ["cpt_16b", "cpt_100b"])
def test_big_runs_get_past_bad_steps_by_themselves(experiment: str) -> None:
    """By a checkpoint that is there: validation refuses the policy without one."""
    config = compose(Config, [f"experiment={experiment}"])
    validate(config)
    assert {config.trainer.stability.nonfinite, config.trainer.stability.spike} == {"rollback"}
    config.checkpoint.every = 0
    with pytest.raises(ConfigError, match=r"rollback needs checkpoints"):
        validate(config)


@pytest.mark.parametrize(
    ("name", "total", "active", "active_without_embeddings"),
    [
        ("ling_mini", 16_255_638_528, 1_432_968_192, 0.789e9),
        ("ling_flash", 102_889_697_280, 6_152_269_824, 4.865e9),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, total: int, active: int, active_without_embeddings: float
) -> None:
    assert total_parameters(model(name)) == total
    assert active_parameters(model(name)) == active
    assert active_parameters(model(name), embeddings=False) == pytest.approx(active_without_embeddings, rel=1e-3)


def test_dense_counts() -> None:
    smollm = model("smollm2_135m")
    without_mask = 134_515_008
    assert total_parameters(smollm) == active_parameters(smollm) == without_mask + smollm.hidden_size
    assert embedding_parameters(smollm) == 49153 * 576


def test_counts_are_those_of_a_built_model() -> None:
    from llada_mega.models import build_model

    for name in ("tiny", "tiny_ling"):
        built = build_model(model(name), seed=None)
        weights = sum(parameter.numel() for parameter in built.parameters())
        padding = 0
        for key, parameter in built.named_parameters():
            if key.endswith(("word_embeddings.weight", "output_layer.weight")):
                padding += (parameter.shape[0] - model(name).vocab_size) * parameter.shape[1]
        assert weights - padding == total_parameters(model(name))


def test_what_the_report_does_not_publish_is_marked_and_listed() -> None:
    """Tokens, learning rates, batch sizes, noise and merge count of the big runs."""
    table = (ROOT / "docs" / "assumptions.md").read_text("utf-8")
    unpublished = {
        "curriculum/warmup_stable_decay.yaml": ["tokens", "lr", "embedding_noise"],
        "curriculum/warmup_stable_decay_large.yaml": ["tokens", "lr", "embedding_noise"],
        "optimizer/continual.yaml": ["lr", "min_lr", "beta1", "beta2", "weight_decay", "clip_grad"],
        "checkpoint/large.yaml": ["keep_best"],
        "trainer/large.yaml": ["nonfinite", "spike"],
        "experiment/cpt_16b.yaml": ["global_batch_size"],
        "experiment/cpt_100b.yaml": ["global_batch_size", "lr", "min_lr"],
        "model/ling_mini.yaml": ["bias_update_rate"],
        "model/ling_flash.yaml": ["bias_update_rate"],
    }
    for file, keys in unpublished.items():
        lines = (config_directory() / file).read_text("utf-8").splitlines()
        for key in keys:
            stated = [line for line in lines if re.match(rf"\s*{key}:", line)]
            assert stated, f"{file} says nothing about {key}"
            assert all("# assumption" in line for line in stated), f"{key} in {file} is not marked"
            assert key in table, f"docs/assumptions.md does not list {key}"


def test_comments_explain_the_keys_with_choices() -> None:
    """``--help`` and the reference take their words from the comments beside the fields."""
    comments = {key.path: key.comment for key in walk(Config)}
    assert comments["objective.weighting"] == "elbo | uniform"
    assert comments["trainer.init"].startswith("checkpoint whose weights")
    assert comments["curriculum.stages[].embedding_noise.decay_tokens"] == "0: no noise"
