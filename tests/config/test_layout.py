"""Layouts that cannot be are refused before any process starts, and every refusal names one that can."""

from __future__ import annotations

import re

import pytest

from llada_mega.config.compose import compose
from llada_mega.config.layout import check_batches, check_group_sizes, check_layout, stage_layers
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.config.training import TrainerConfig
from llada_mega.config.validate import validate
from llada_mega.errors import ConfigError

FIRST, LAST = "parallel.num_layers_in_first_pipeline_stage", "parallel.num_layers_in_last_pipeline_stage"


def layout(**sizes: object) -> ParallelConfig:
    """``first`` and ``last`` are the layers of the outer stages."""
    named = {f"num_layers_in_{end}_pipeline_stage": sizes.pop(end) for end in ("first", "last") if end in sizes}
    return ParallelConfig(**sizes, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_layers", "parallel", "message"),
    [
        (
            20,
            layout(pp=3),
            "parallel.pp=3 x parallel.vp=1 does not divide model.num_layers=20; use parallel.pp=1, 2, 4,",
        ),
        (20, layout(pp=3), f"or {FIRST}=7 {LAST}=6"),
        (20, layout(pp=4, vp=2), "parallel.pp=4 x parallel.vp=2 does not divide model.num_layers=20"),
        (20, layout(pp=4, vp=2), f"or {FIRST}=4 {LAST}=4"),
        (7, layout(pp=2), f"use parallel.pp=1 or 7, or {FIRST}=4 {LAST}=3"),
        (7, layout(pp=2, vp=2), "does not divide model.num_layers=7; use parallel.vp=null"),
        (8, layout(pp=1, first=4), f"{FIRST}=4 needs a pipeline, but parallel.pp=1; set {FIRST}=null"),
        (8, layout(pp=2, first=0, last=8), f"{FIRST}=0 does not split into parallel.vp=1 chunks; use a multiple of 1"),
        (8, layout(pp=2, vp=2, last=3), f"{LAST}=3 does not split into parallel.vp=2 chunks; use a multiple of 2"),
        (8, layout(pp=2, first=3, last=3), f"{FIRST}=3 {LAST}=3 leave 2 of model.num_layers=8 to 0 stages"),
        (8, layout(pp=4, first=1, last=2), f"{FIRST}=1 {LAST}=2 leave 5 of model.num_layers=8 to 2 stages"),
        (8, layout(pp=3, first=8), f"{FIRST}=8 leave 0 of model.num_layers=8 to 2 stages"),
    ],
)
def test_stages_that_do_not_divide(num_layers: int, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_layout(ModelConfig(num_layers=num_layers), parallel)


@pytest.mark.parametrize(
    ("num_layers", "parallel", "stages"),
    [
        (8, layout(), [8]),
        (8, layout(pp=4), [2, 2, 2, 2]),
        (8, layout(pp=2, first=5, last=3), [5, 3]),
        (8, layout(pp=3, last=2), [3, 3, 2]),
        (10, layout(pp=4, first=2, last=2), [2, 3, 3, 2]),
        (8, layout(pp=2, vp=2, first=6), [6, 2]),
    ],
)
def test_layers_of_stages(num_layers: int, parallel: ParallelConfig, stages: list[int]) -> None:
    check_layout(ModelConfig(num_layers=num_layers), parallel)
    assert stage_layers(num_layers, parallel) == stages


@pytest.mark.parametrize("num_layers", range(2, 25))
@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("virtual", [None, 2])
def test_every_layout_that_a_refusal_names_is_accepted(num_layers: int, pp: int, virtual: int | None) -> None:
    try:
        check_layout(ModelConfig(num_layers=num_layers), layout(pp=pp, vp=virtual))
        return
    except ConfigError as refusal:
        named = str(refusal).split("; use ")[1]
    if ends := re.search(rf"{FIRST}=(\d+) {LAST}=(\d+)", named):
        parallel = layout(pp=pp, vp=virtual, first=int(ends[1]), last=int(ends[2]))
        check_layout(ModelConfig(num_layers=num_layers), parallel)
        stages = stage_layers(num_layers, parallel)
        assert sum(stages) == num_layers
        assert stages[-1] <= stages[0] <= max(stages)
    if sizes := re.match(r"parallel\.pp=([\d, or]+?)(,? or parallel|$)", named):
        for size in map(int, re.findall(r"\d+", sizes[1])):
            check_layout(ModelConfig(num_layers=num_layers), layout(pp=size, vp=virtual if size > 1 else None))
    assert ends or sizes or "parallel.vp=null" in named


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        (
            {"tp": 3},
            8,
            "parallel.tp=3 x pp=1 x cp=1 = 3 does not divide the 8 processes of this run; start a multiple of",
        ),
        ({"tp": 3}, 8, "3, or choose sizes whose product is 1, 2, 4 or 8"),
        ({"ep": 4}, 2, "parallel.etp=1 x ep=4 x pp=1 = 4 does not divide the 2 processes"),
        ({"vp": 2}, 1, "parallel.vp=2 needs a pipeline, but parallel.pp=1; set parallel.vp=null"),
        ({"sp": True}, 1, "parallel.sp=true needs parallel.tp of 2 or more; set parallel.sp=false"),
        ({"tp": 0}, 1, "parallel.tp=0 is too small; use 1 or more"),
        ({"timeout_minutes": 0}, 1, "parallel.timeout_minutes=0 is too small"),
    ],
)
def test_group_sizes(sizes: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_group_sizes(ParallelConfig(**sizes), world_size)  # type: ignore[arg-type]


def test_possible_group_sizes_pass() -> None:
    check_group_sizes(ParallelConfig(tp=2, pp=2, ep=4, sp=True), 16)


@pytest.mark.parametrize(
    ("batch", "parallel", "world_size", "message"),
    [
        (
            6,
            layout(),
            4,
            "trainer.global_batch_size=6 is no multiple of trainer.micro_batch_size=1 x 4 data-parallel ran",
        ),
        (6, layout(), 4, "use a multiple of 4, as in 4 or 8"),
        (6, layout(pp=4, vp=2), 4, "x parallel.pp=4 (interleaved stages take micro-batches by 4); use a multiple of 4"),
        (2, layout(), 4, "use a multiple of 4, as in 4"),
    ],
)
def test_batches(batch: int, parallel: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_batches(TrainerConfig(global_batch_size=batch), parallel, world_size)


def test_batches_that_divide_pass() -> None:
    check_batches(TrainerConfig(global_batch_size=6), layout(pp=4), 4)
    check_batches(TrainerConfig(global_batch_size=16, micro_batch_size=2), layout(pp=2, vp=2), 8)


def test_an_all_gather_over_different_samples_needs_one_length() -> None:
    gathering = ["data.train=corpus", "model=tiny_ling", "parallel.ep=2", "parallel.dispatcher=allgather"]
    with pytest.raises(ConfigError, match=r"set data\.clean_tokens=all or parallel\.dispatcher=alltoall"):
        validate(compose(Config, gathering))
    validate(compose(Config, [*gathering, "data.clean_tokens=all"]))
    validate(compose(Config, [*gathering, "parallel.tp=2", "parallel.sp=true"]))


@pytest.mark.parametrize(("experiment", "world_size"), [("cpt_16b", 64), ("cpt_100b", 256)])
def test_the_published_models_fit_their_layouts(experiment: str, world_size: int) -> None:
    validate(compose(Config, [f"experiment={experiment}"]), world_size=world_size)
    with pytest.raises(ConfigError, match="start a multiple of"):
        validate(compose(Config, [f"experiment={experiment}"]), world_size=world_size - 1)
