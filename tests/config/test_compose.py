"""Composition: groups, overrides, sweeps, and one line for every mistake."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest
import yaml
from omegaconf import MISSING

from llada_mega.config.compose import compose, compose_yaml, config_groups, expand_sweep, is_swept
from llada_mega.config.schema import Config
from llada_mega.errors import ConfigError


@dataclass
class Options:
    """Stands for the options of a small command."""

    path: str = MISSING  # where it is
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [1])
    checkpoint: Optional[str] = None


def test_defaults_are_those_of_the_dataclasses_and_groups() -> None:
    config = compose(Config)
    assert config.run.dir == "runs/run"
    assert config.model.vocab_size == 257
    assert [stage.block_size for stage in config.curriculum.stages] == [32]


def test_command_line_beats_experiment_beats_group() -> None:
    assert compose(Config, ["experiment=quickstart"]).trainer.global_batch_size == 2
    changed = compose(Config, ["trainer.global_batch_size=6", "experiment=quickstart", "optimizer=continual"])
    assert changed.trainer.global_batch_size == 6
    assert changed.run.name == "quickstart"
    assert changed.run.dir == "runs/quickstart"


def test_elements_of_lists_can_be_overridden() -> None:
    config = compose(Config, ["experiment=quickstart", "curriculum.stages.1.tokens=512"])
    assert config.curriculum.stages[1].tokens == 512
    assert config.curriculum.stages[1].block_size == 4


def test_async_is_the_key_that_users_type() -> None:
    assert compose(Config, ["checkpoint.async=true"]).checkpoint.async_save is True
    assert compose(Config, ["++checkpoint.async=true"]).checkpoint.async_save is True


def test_a_single_value_stands_for_a_list_of_one() -> None:
    assert compose(Config, ["trainer.validation.block_sizes=8"]).trainer.validation.block_sizes == [8]
    corpora = compose(Config, ["data.train=data/my corpus"]).data.train
    assert [(corpus.path, corpus.weight) for corpus in corpora] == [("data/my corpus", 1.0)]
    blend = compose(Config, ["data.train=[{path: a, weight: 2}, {path: b}]"]).data.train
    assert [(corpus.path, corpus.weight) for corpus in blend] == [("a", 2.0), ("b", 1.0)]


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "Hello, world! 1 + 1 = 2 (yes) [no] {x: y}",
        'it\'s "quoted" and C:\\path\\',
        "back\\'slash quote",
        "a=b,c=d",
        "  spaces  kept  ",
        "true",
        "12",
        "1e3",
        "Umlaute äöü, 日本語, 🙂",
        "100 % of $5",
        "two\nlines",
    ],
)
def test_text_needs_no_quotes(text: str) -> None:
    assert compose(Options, [f"path={text}"]).path == text
    assert compose(Options, ["path=x", f"names={text}"]).names == [text]


def test_quoted_and_interpolated_text_is_left_alone() -> None:
    assert compose(Options, ["path='a, b'"]).path == "a, b"
    assert compose(Options, ['path="a, b"']).path == "a, b"
    assert compose(Options, ["path=x", "checkpoint=${path}/latest"]).checkpoint == "x/latest"
    assert compose(Options, ["path=x", "checkpoint=null"]).checkpoint is None


def test_names_of_groups_are_plain_keys_of_other_commands() -> None:
    assert compose(Options, ["path=x", "checkpoint=runs/x"]).checkpoint == "runs/x"


def test_cfg_prints_yaml_that_composes_to_the_same() -> None:
    printed = yaml.safe_load(compose_yaml(Config, ["experiment=cpt_100b"]))
    assert printed["model"]["num_layers"] == 32
    assert printed["run"]["dir"] == "runs/${run.name}"


def test_own_experiments_are_found_on_the_search_path(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /model: tiny_ling\nrun: {name: mine}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose(Config, [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert config.run.name == "mine"
    assert config.model.is_moe


def test_composing_writes_nothing_and_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose(Config, ["experiment=cpt_16b"])
    expand_sweep(Config, ["seed=1,2"])
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


MISTAKES = [
    (["trainer.max_step=3"], "trainer.max_step is not a key; did you mean trainer.max_steps?"),
    (["+trainer.max_step=3"], "trainer.max_step is not a key; did you mean trainer.max_steps?"),
    (["++trainer.max_step=3"], "trainer.max_step is not a key; did you mean trainer.max_steps?"),
    (["max_steps=3"], "max_steps is not a key; did you mean trainer.max_steps?"),
    (["optim.lr=1"], "optim.lr is not a key; did you mean optimizer.lr?"),
    (["experiments=quickstart"], "experiments is not a key; did you mean experiment?"),
    (["objective.zzz=1"], "objective.zzz is not a key; objective has weighting, schedule, t_min, t_max, level"),
    (["trainer.max_steps=abc"], "trainer.max_steps='abc' has the wrong type; expected integer or null"),
    (["trainer.max_steps=1.5"], "trainer.max_steps=1.5 has the wrong type; expected integer or null"),
    (["optimizer.lr=fast"], "optimizer.lr='fast' has the wrong type; expected number"),
    (["logging.wandb=maybe"], "logging.wandb='maybe' has the wrong type; expected true or false"),
    (["seed=null"], "seed=null is not allowed; expected integer"),
    (["seed=[1,2]"], "seed=[1, 2] has the wrong type; expected integer"),
    (
        ["trainer.validation.block_sizes=[a]"],
        "trainer.validation.block_sizes.0='a' has the wrong type; expected integer",
    ),
    (["data.train=[{pat: x}]"], "data.train[].pat is not a key; did you mean data.train[].path?"),
    (["data.train=[{path: x, weight: a}]"], "data.train[].weight='a' has the wrong type; expected number"),
    (["model=ling_min"], "model=ling_min is not a choice; did you mean ling_mini? There are: "),
    (["experiment=nope"], "experiment=nope is not a choice; there are: cpt_100b, "),
    (["trainer=3"], "trainer=3 is not a choice; trainer names one of: default, "),
    (["seed"], "cannot read 'seed': expected key=value"),
    (["max_steps"], "cannot read 'max_steps': expected key=value, such as trainer.max_steps=..."),
    (["data.train=[a"], "cannot read 'data.train=[a': expected key=value"),
    (["seed=1,2"], "seed=1,2 is a sweep; add --multirun, or write a list as seed=[1,2]"),
    (["~seed"], "~seed would remove a key that is needed"),
    (["hydra.run.dir=x"], "hydra.run.dir has no effect here; a run writes to run.dir"),
    (["run.name=${nope}"], "run.name: Interpolation key 'nope' not found"),
    (["experiment=quickstart", "curriculum.stages.0.block_sizes=4"], "did you mean curriculum.stages[].block_size?"),
    (["curriculum.stages.0.objective.t_min=0.3"], "curriculum.stages.0.objective is null and cannot be filled in"),
    (["curriculum.stages.0.objective={t_min: 0.3}"], "curriculum.stages.0.objective is null and cannot be filled in"),
    (["experiment=quickstart", "curriculum.stages.9.tokens=4"], "curriculum.stages.9 is past the end of its list"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES])
def test_every_mistake_is_one_line_with_a_way_out(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(Config, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model/own.yaml", "num_layer: 3\n", "model.num_layer is not a key (in configs/model/own.yaml); did you mean"),
        (
            "model/own.yaml",
            "num_layers: three\n",
            "model.num_layers='three' (in configs/model/own.yaml) has the wrong type",
        ),
        ("model/own.yaml", "moe: {num_expert: 3}\n", "did you mean model.moe.num_experts?"),
        ("model/own.yaml", "moe: [3\n", "own.yaml line "),
        ("curriculum/own.yaml", "stages: [{name: a, block: 4}]\n", "curriculum.stages[].block is not a key"),
        ("curriculum/own.yaml", "stages: [{lr: {shapes: x}}]\n", "did you mean curriculum.stages[].lr.shape?"),
    ],
)
def test_mistakes_in_files_name_the_file(tmp_path: Path, file: str, content: str, message: str) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        compose(Config, [f"hydra.searchpath=[file://{tmp_path}]", f"{path.parent.name}=own"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_value_says_which_key() -> None:
    with pytest.raises(ConfigError, match=r"path has no value; set path=\.\.\."):
        compose(Options)


def test_sweeps_are_hydras_own() -> None:
    jobs = expand_sweep(
        Config, ["seed=1,2", "optimizer.lr=choice(1e-4,1e-5)", "run.name=a", "trainer.log_every=range(1,3)"]
    )
    assert len(jobs) == 8
    assert jobs[0] == ["seed=1", "optimizer.lr=0.0001", "run.name=a", "trainer.log_every=1"]
    assert jobs[-1] == ["seed=2", "optimizer.lr=1e-05", "run.name=a", "trainer.log_every=2"]
    assert is_swept(jobs, "seed")
    assert not is_swept(jobs, "run.name")
    experiments = expand_sweep(Config, ["experiment=glob(cpt_*)"])
    assert experiments == [["experiment=cpt_100b"], ["experiment=cpt_16b"]]


def test_every_job_of_a_sweep_composes() -> None:
    for job in expand_sweep(Options, ["path=x,y", "sizes=[1],[2,3]", "names='a,b'"]):
        options = compose(Options, job)
        assert options.path in "xy"
        assert options.sizes in ([1], [2, 3])
        assert options.names == ["a,b"]


def test_the_groups_are_those_of_the_design() -> None:
    assert set(config_groups()) == {
        "model",
        "data",
        "parallel",
        "curriculum",
        "objective",
        "optimizer",
        "trainer",
        "checkpoint",
        "logging",
        "experiment",
    }
