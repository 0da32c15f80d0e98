"""Contradictions between keys: each refused with the keys, their values and a fix."""

from __future__ import annotations

import pytest

from llada_mega.config.compose import compose
from llada_mega.config.schema import Config
from llada_mega.config.training import StageConfig
from llada_mega.config.validate import ATTENTION_BACKENDS, MAX_SEED, validate, validation_metrics
from llada_mega.errors import ConfigError

VALID = ["data.train=corpus"]
MOE = [*VALID, "model=tiny_ling"]
MINI = ["experiment=cpt_16b"]

CONTRADICTIONS = [
    # run
    ([*VALID, "run.name=a/b"], "run.name='a/b' must be a plain name"),
    ([*VALID, "run.name="], "run.name='' must be a plain name"),
    ([*VALID, "run.dir="], "run.dir is empty"),
    ([*VALID, "seed=-1"], "seed=-1 is out of range"),
    ([*VALID, "launch.nproc=0"], "launch.nproc=0 is too small; use 1 or more"),
    # model
    (
        [*VALID, "model.architecture=gpt"],
        "model.architecture=gpt is not a choice; use llama, qwen2, qwen3, llada2_moe or qwen3_moe",
    ),
    ([*VALID, "model.attention_backend=flash"], "model.attention_backend=flash is not a choice; use auto, "),
    ([*VALID, "model.implementation=jax"], "model.implementation=jax is not a choice; use auto, local or te"),
    ([*VALID, "model.num_layers=0"], "model.num_layers=0 is too small; use 1 or more"),
    (
        [*VALID, "model.num_query_groups=3"],
        "model.num_query_groups=3 does not divide model.num_attention_heads=4; use 1, 2 or 4",
    ),
    ([*VALID, "model.head_dim=15"], "model.head_dim=15 is odd"),
    ([*VALID, "model.rotary_percent=0.3"], "model.rotary_percent=0.3 of model.head_dim=16"),
    ([*VALID, "model.rotary_percent=0"], "model.rotary_percent=0.0 of model.head_dim=16"),
    ([*VALID, "model.rope_theta=0"], "model.rope_theta=0.0 must be positive"),
    ([*VALID, "model.qk_norm=true"], "model.qk_norm=true does not fit model.architecture=llama"),
    ([*VALID, "model.qkv_bias=true"], "model.qkv_bias=true does not fit model.architecture=llama"),
    ([*VALID, "model.architecture=llada2_moe"], "does not fit model.moe.num_experts=0; set model.moe.num_experts"),
    ([*VALID, "model.moe.num_experts=8"], "model.architecture=llama does not fit model.moe.num_experts=8"),
    ([*VALID, "model.mask_token_id=null"], "model.mask_token_id is null"),
    ([*VALID, "model.mask_token_id=257"], "model.mask_token_id=257 is outside the vocabulary; use 0 to 256"),
    ([*VALID, "model.eos_token_id=-1"], "model.eos_token_id=-1 is outside the vocabulary"),
    ([*VALID, "model.pad_token_id=256"], "model.mask_token_id=256 is also model.pad_token_id"),
    # mixture of experts
    ([*MOE, "model.moe.score_function=softmax"], "score_function=softmax does not fit model.architecture=llada2_moe"),
    ([*MOE, "model.moe.num_groups=3"], "model.moe.num_groups=3 does not divide model.moe.num_experts=16"),
    ([*MOE, "model.moe.group_top_k=5"], "model.moe.group_top_k=5 exceeds model.moe.num_groups=4"),
    ([*MOE, "model.moe.top_k=9"], "model.moe.top_k=9 exceeds the experts of 2 groups of 4"),
    ([*MOE, "model.moe.top_k=3"], "model.moe.top_k=3 must be twice model.moe.group_top_k=2"),
    ([*MOE, "model.moe.first_dense_layers=6"], "model.moe.first_dense_layers=6 leaves no layer of model.num_layers=6"),
    ([*MOE, "model.moe.routed_scaling_factor=0"], "model.moe.routed_scaling_factor=0.0 must be positive"),
    # parallel
    (
        [*MINI, "parallel.tp=3"],
        "parallel.tp=3 does not divide model.num_attention_heads=16; use 1, 2, 4, 8 or 16",
    ),
    ([*MINI, "parallel.tp=8"], "parallel.tp=8 does not divide model.num_query_groups=4; use 1, 2 or 4"),
    ([*MINI, "parallel.tp=2"], "parallel.tp=2 with experts needs sequence parallelism; set parallel.sp=true"),
    ([*MINI, "parallel.sp=true"], "parallel.sp=true needs parallel.tp of 2 or more"),
    ([*MINI, "parallel.ep=3"], "parallel.ep=3 does not divide model.moe.num_experts=256; use 1, 2, 4, 8"),
    ([*MINI, "parallel.etp=3"], "parallel.etp=3 does not divide model.moe.expert_ffn_hidden_size=512"),
    ([*MINI, "parallel.pp=3"], "parallel.pp=3 x parallel.vp=1 does not divide model.num_layers=20"),
    ([*MINI, "parallel.pp=4", "parallel.vp=2"], "parallel.pp=4 x parallel.vp=2 does not divide model.num_layers=20"),
    ([*MINI, "parallel.vp=2"], "parallel.vp=2 needs a pipeline, but parallel.pp=1"),
    ([*MINI, "parallel.cp=0"], "parallel.cp=0 is too small"),
    ([*MINI, "parallel.dispatcher=nvlink"], "parallel.dispatcher=nvlink is not a choice; use alltoall, allgather,"),
    ([*MINI, "parallel.recompute=some"], "parallel.recompute=some is not a choice; use none, selective or full"),
    ([*VALID, "parallel.ep=2"], "parallel.ep=2 parallel.etp=1 split experts, and the model has none"),
    # data
    ([], "data.train is empty; give data.train=PREFIX"),
    (["data.train=[{weight: 1}]"], "data.train.0.path is empty"),
    (["data.train=[{path: x, weight: 0}]"], "data.train.0.weight=0.0 must be positive"),
    (
        [*VALID, "data.document_alignment=48"],
        "data.document_alignment=48 does not divide data.sequence_length=128; use 1, 2, 4, 8, 16, 32, 64 or 128",
    ),
    (
        [*VALID, "data.sequence_length=4096"],
        "data.sequence_length=4096 exceeds model.max_position_embeddings=2048",
    ),
    ([*VALID, "data.block_origin=batch"], "data.block_origin=batch is not a choice"),
    ([*VALID, "data.clean_tokens=some"], "data.clean_tokens=some is not a choice"),
    ([*VALID, "data.valid_fraction=0.6"], "data.valid_fraction=0.6 is out of range; use 0 to 0.5"),
    # objective
    ([*VALID, "objective.weighting=mean"], "objective.weighting=mean is not a choice; use elbo or uniform"),
    ([*VALID, "objective.schedule=sqrt"], "objective.schedule=sqrt is not a choice"),
    ([*VALID, "objective.level=token"], "objective.level=token is not a choice"),
    (
        [*VALID, "objective.t_min=0.8", "objective.t_max=0.3"],
        "objective.t_min=0.8 objective.t_max=0.3 is no range of mask levels; use 0 <= t_min < t_max <= 1",
    ),
    # curriculum
    ([*VALID, "curriculum.stages=[]"], "curriculum.stages is empty"),
    ([*VALID, "curriculum.stages.0.tokens=0"], "curriculum.stages.0.tokens=0 trains on nothing"),
    ([*VALID, "curriculum.stages.0.block_size=0"], "curriculum.stages.0.block_size=0 does not fit"),
    ([*VALID, "curriculum.stages.0.block_size=256"], "curriculum.stages.0.block_size=256 does not fit"),
    (
        [*VALID, "curriculum.stages.0.block_size=24", "data.block_origin=sequence"],
        "curriculum.stages.0.block_size=24 does not divide data.sequence_length=128",
    ),
    ([*VALID, "curriculum.stages.0.sequence_length=64"], "curriculum.stages.0.sequence_length=64 differs from"),
    ([*VALID, "curriculum.stages.0.lr.shape=step"], "curriculum.stages.0.lr.shape=step is not a choice"),
    ([*VALID, "curriculum.stages.0.lr.peak=-1"], "curriculum.stages.0.lr.peak=-1.0 is negative"),
    ([*VALID, "curriculum.stages.0.lr.warmup_tokens=2000000"], "lr.warmup_tokens=2000000 exceeds"),
    ([*VALID, "curriculum.stages.0.embedding_noise.std=-1"], "embedding_noise.std=-1.0 is negative"),
    (
        [*VALID, "curriculum.stages=[{tokens: 9, objective: {t_min: 0.5, t_max: 0.5}}]"],
        "curriculum.stages.0.objective.t_min=0.5",
    ),
    ([*VALID, "curriculum.stages.0.data=[{path: x, weight: -1}]"], "curriculum.stages.0.data.0.weight=-1.0"),
    # optimizer and trainer
    ([*VALID, "optimizer.lr=0"], "optimizer.lr=0.0 must be a positive number"),
    ([*VALID, "optimizer.lr=inf"], "optimizer.lr=inf must be a positive number"),
    ([*VALID, "model.moe.num_experts=-1"], "model.moe.num_experts=-1 is too small"),
    (
        [*VALID, "curriculum.stages=[{tokens: 9, lr: {shape: constant, end: 0.1}}]"],
        "curriculum.stages.0.lr.end=0.1 has no effect with shape=constant",
    ),
    ([*VALID, "optimizer.min_lr=1"], "optimizer.min_lr=1.0 is not between 0 and optimizer.lr=0.0001"),
    ([*VALID, "optimizer.beta2=1"], "optimizer.beta2=1.0 is out of range"),
    ([*VALID, "optimizer.clip_grad=-1"], "optimizer.clip_grad=-1.0 is too small; use 0 or more"),
    ([*VALID, "trainer.dtype=float16"], "trainer.dtype=float16 is not a choice; use float32 or bfloat16"),
    ([*VALID, "trainer.max_steps=0"], "trainer.max_steps=0 is too small"),
    (
        [*VALID, "trainer.global_batch_size=6", "trainer.micro_batch_size=4"],
        "trainer.global_batch_size=6 is no multiple of trainer.micro_batch_size=4 x 1 data-parallel ranks",
    ),
    ([*VALID, "trainer.stability.spike=ignore"], "trainer.stability.spike=ignore is not a choice"),
    ([*VALID, "trainer.stability.spike_factor=1"], "trainer.stability.spike_factor=1.0 would call every step a spike"),
    # validation and checkpoints
    ([*VALID, "trainer.validation.every=5"], "trainer.validation.every=5 has nothing to read"),
    (
        [*VALID, "trainer.validation.every=5", "data.valid=x", "trainer.validation.block_sizes=[]"],
        "trainer.validation.block_sizes is empty",
    ),
    (
        [*VALID, "trainer.validation.every=5", "data.valid=x", "trainer.validation.block_sizes=[8,200]"],
        "trainer.validation.block_sizes.1=200 does not fit data.sequence_length=128",
    ),
    ([*VALID, "checkpoint.keep_best=1"], "checkpoint.keep_best=1 needs validation; set trainer.validation.every"),
    (
        [*VALID, "checkpoint.keep_best=1", "checkpoint.every=7", "trainer.validation.every=5", "data.valid=x"],
        "checkpoint.every=7 is no multiple of trainer.validation.every=5; set checkpoint.every=5",
    ),
    (
        [
            *VALID,
            "checkpoint.keep_best=1",
            "checkpoint.every=5",
            "trainer.validation.every=5",
            "data.valid=x",
            "checkpoint.best_metric=loss",
        ],
        "checkpoint.best_metric=loss is not a choice; use valid/block_32/ce_masked, ",
    ),
    ([*VALID, "checkpoint.keep_last=0"], "checkpoint.keep_last=0 is too small"),
    (
        [*VALID, "checkpoint.merge_at_end=2"],
        "checkpoint.merge_at_end=2 needs validation; set trainer.validation.every",
    ),
    ([*VALID, "checkpoint.resume="], "checkpoint.resume is empty"),
    ([*VALID, "logging.wandb_mode=cloud"], "logging.wandb_mode=cloud is not a choice; use offline or online"),
    ([*VALID, "logging.peak_tflops=0"], "logging.peak_tflops=0.0 must be positive; null takes it from the table"),
    ([*VALID, "logging.profile.start=-1"], "logging.profile.start=-1 is too small; use 0 or more"),
    ([*VALID, "logging.profile.steps=0"], "logging.profile.steps=0 is too small; use 1 or more"),
    ([*VALID, "logging.profile.ranks=[0,-2]"], "logging.profile.ranks=[0, -2] has [-2] among them"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), CONTRADICTIONS, ids=[" ".join(overrides) for overrides, _ in CONTRADICTIONS]
)
def test_contradictions_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose(Config, overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_contradictions_start_from_is_valid() -> None:
    for overrides in (VALID, MOE, MINI):
        validate(compose(Config, overrides))


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            [*MINI, "parallel.ep=1", "parallel.cp=2"],
            3,
            "parallel.tp=1 x pp=1 x cp=2 = 2 does not divide the 3 processes",
        ),
        (MINI, 4, "parallel.etp=1 x ep=8 x pp=1 = 8 does not divide the 4 processes"),
        ([*VALID, "trainer.global_batch_size=6"], 4, "x 4 data-parallel ranks; use a multiple of 4"),
        (
            [*VALID, "data.valid_fraction=0.1", "trainer.validation.every=1", "trainer.validation.windows=9"],
            2,
            "trainer.validation.windows=9 do not split over 2 data-parallel ranks",
        ),
        ([*VALID, "trainer.micro_batch_size=2"], 8, "trainer.micro_batch_size=2 x 8 data-parallel ranks"),
    ],
)
def test_the_number_of_processes_must_fit(overrides: list[str], world_size: int, message: str) -> None:
    config = compose(Config, overrides)
    validate(config)
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=world_size)
    assert message in str(caught.value)


def test_model_parallel_ranks_share_a_batch() -> None:
    overrides = [*MINI, "parallel.ep=1", "parallel.cp=2", "parallel.pp=2", "trainer.global_batch_size=2"]
    validate(compose(Config, overrides), world_size=8)


def test_ungrouped_routing_needs_no_pairing() -> None:
    validate(compose(Config, [*MOE, "model.moe.num_groups=1", "model.moe.group_top_k=1", "model.moe.top_k=3"]))


def test_a_stage_with_its_own_data_needs_no_other() -> None:
    validate(compose(Config, ["curriculum.stages=[{block_size: 4, tokens: 100, data: [{path: x}]}]"]))


def test_validation_metrics_are_those_that_are_written() -> None:
    config = compose(Config, ["trainer.validation.block_sizes=[1,8]"])
    assert validation_metrics(config) == [
        "valid/block_1/ce_masked",
        "valid/block_1/nll_bound",
        "valid/block_1/accuracy",
        "valid/block_8/ce_masked",
        "valid/block_8/nll_bound",
        "valid/block_8/accuracy",
        "valid/ar_nll",
    ]


def test_choices_are_those_of_the_library() -> None:
    from llada_kernels.attention import BACKENDS

    from llada_mega.diffusion.random import _MAX_SEED
    from llada_mega.diffusion.stages import LR_SHAPES

    assert set(ATTENTION_BACKENDS) == {"auto", *BACKENDS}
    assert MAX_SEED == _MAX_SEED
    for shape in LR_SHAPES:
        config = compose(Config, VALID)
        config.curriculum.stages = [StageConfig(tokens=100)]
        config.curriculum.stages[0].lr.shape = shape
        validate(config)
