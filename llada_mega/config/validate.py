"""Every check that needs more than one key, or more than a key's type. One place, run before anything expensive.

Each failure is a ConfigError of one line that names the keys, their values and a fix. ``preflight`` then looks at
what lies outside the configuration: files, directories and what this version can run.
"""

from __future__ import annotations

import math

from llada_mega.config.checks import at_least, divides, one_of, require
from llada_mega.config.fp8 import check_fp8
from llada_mega.config.layout import check_batches, check_group_sizes, check_layout, check_lengths, data_parallel_size
from llada_mega.config.model import ModelConfig
from llada_mega.config.moe import SCORE_FUNCTIONS, check_routing
from llada_mega.config.schema import Config
from llada_mega.config.training import ObjectiveConfig, StageConfig
from llada_mega.errors import ConfigError

# (qk_norm, qkv_bias) of each Hugging Face family: a model that its family cannot express could not be exported.
ARCHITECTURES = {
    "llama": (False, False),
    "qwen2": (False, True),
    "qwen3": (True, False),
    "llada2_moe": (True, False),
    "qwen3_moe": (True, False),
}
ATTENTION_BACKENDS = ("auto", "cpu", "cudnn", "flex", "triton", "reference")
MAX_SEED = 2**56  # the random number generator's key holds the seed and eight bits of stream


def validate(config: Config, world_size: int | None = None) -> None:
    """Raises ConfigError for the first contradiction in ``config``.

    ``world_size`` is the number of processes; None leaves out what depends on it.
    """
    _check_run(config)
    _check_model(config.model)
    if config.model.is_moe:
        _check_moe(config.model)
    check_layout(config.model, config.parallel)
    check_lengths(config.data, config.model, config.parallel)
    check_group_sizes(config.parallel, world_size)
    _check_data(config)
    _check_objective("objective", config.objective)
    _check_curriculum(config)
    _check_optimizer(config)
    _check_trainer(config, world_size)
    _check_validation(config, world_size)
    _check_checkpoint(config)
    _check_logging(config, world_size)


def validation_metrics(config: Config) -> list[str]:
    """Names of the metrics that validation writes, ``checkpoint.best_metric`` among them."""
    names = ("ce_masked", "nll_bound", "accuracy")
    blocks = config.trainer.validation.block_sizes
    return [f"valid/block_{block}/{name}" for block in blocks for name in names] + ["valid/ar_nll"]


def _check_logging(config: Config, world_size: int | None) -> None:
    logging, profile = config.logging, config.logging.profile
    one_of("logging.wandb_mode", logging.wandb_mode, ("offline", "online"))
    peak = logging.peak_tflops
    require(peak is None or peak > 0, f"logging.peak_tflops={peak} must be positive; null takes it from the table")
    at_least(0, logging__profile__start=profile.start)
    at_least(1, logging__profile__steps=profile.steps)
    beyond = [rank for rank in profile.ranks if rank < 0 or (world_size is not None and rank >= world_size)]
    processes = "ranks of the run" if world_size is None else f"0 to {world_size - 1}"
    require(not beyond, f"logging.profile.ranks={profile.ranks} has {beyond} among them; use {processes}")


def _check_run(config: Config) -> None:
    name = config.run.name
    require(bool(name) and "/" not in name, f"run.name={name!r} must be a plain name; a directory goes into run.dir")
    require(bool(config.run.dir), "run.dir is empty; name the directory that the run writes to")
    require(0 <= config.seed < MAX_SEED, f"seed={config.seed} is out of range; use 0 to 2**56 - 1")
    at_least(1, launch__nproc=config.launch.nproc)


def _check_model(model: ModelConfig) -> None:
    one_of("model.architecture", model.architecture, list(ARCHITECTURES))
    one_of("model.attention_backend", model.attention_backend, ATTENTION_BACKENDS)
    one_of("model.implementation", model.implementation, ("auto", "local", "te"))
    at_least(0, model__moe__num_experts=model.moe.num_experts)
    at_least(
        1,
        model__num_layers=model.num_layers,
        model__hidden_size=model.hidden_size,
        model__num_attention_heads=model.num_attention_heads,
        model__num_query_groups=model.num_query_groups,
        model__ffn_hidden_size=model.ffn_hidden_size,
        model__max_position_embeddings=model.max_position_embeddings,
    )
    at_least(2, model__head_dim=model.head_dim, model__vocab_size=model.vocab_size)
    heads = ("model.num_attention_heads", model.num_attention_heads)
    divides("model.num_query_groups", model.num_query_groups, *heads)
    require(
        model.head_dim % 2 == 0, f"model.head_dim={model.head_dim} is odd; rotary embeddings turn pairs of channels"
    )
    rotated = model.head_dim * model.rotary_percent
    require(
        0 < model.rotary_percent <= 1 and rotated == int(rotated) and int(rotated) % 2 == 0,
        f"model.rotary_percent={model.rotary_percent} of model.head_dim={model.head_dim} is not an even number; "
        "use 1.0 or 0.5 and a head_dim that is a multiple of 4",
    )
    for key, number in (("rope_theta", model.rope_theta), ("norm_eps", model.norm_eps), ("init_std", model.init_std)):
        require(number > 0, f"model.{key}={number} must be positive")
    _check_family(model)
    _check_special_tokens(model)


def _check_family(model: ModelConfig) -> None:
    is_moe_family = model.architecture in SCORE_FUNCTIONS
    if model.is_moe != is_moe_family:
        fix = (
            "set model.architecture=llada2_moe or qwen3_moe"
            if model.is_moe
            else "set model.moe.num_experts, or use llama, qwen2 or qwen3"
        )
        experts = model.moe.num_experts
        raise ConfigError(
            f"model.architecture={model.architecture} does not fit model.moe.num_experts={experts}; {fix}"
        )
    expected = ARCHITECTURES[model.architecture]
    for key, value, wanted in (("qk_norm", model.qk_norm, expected[0]), ("qkv_bias", model.qkv_bias, expected[1])):
        require(
            value == wanted,
            f"model.{key}={str(value).lower()} does not fit model.architecture={model.architecture}; "
            f"set model.{key}={str(wanted).lower()} or another architecture",
        )


def _check_special_tokens(model: ModelConfig) -> None:
    size = model.vocab_size
    if model.mask_token_id is None:
        raise ConfigError(f"model.mask_token_id is null; name the id of the MASK token, below model.vocab_size={size}")
    for name in ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
        token = getattr(model, name)
        require(
            token is None or 0 <= token < size,
            f"model.{name}={token} is outside the vocabulary; use 0 to {size - 1}, or raise model.vocab_size={size}",
        )
        require(
            name == "mask_token_id" or token != model.mask_token_id,
            f"model.mask_token_id={model.mask_token_id} is also model.{name}; MASK needs a token of its own",
        )


def _check_moe(model: ModelConfig) -> None:
    moe = model.moe
    check_routing(model)
    at_least(
        1,
        model__moe__top_k=moe.top_k,
        model__moe__num_groups=moe.num_groups,
        model__moe__group_top_k=moe.group_top_k,
        model__moe__expert_ffn_hidden_size=moe.expert_ffn_hidden_size,
    )
    at_least(
        0,
        model__moe__shared_expert_ffn_hidden_size=moe.shared_expert_ffn_hidden_size,
        model__moe__first_dense_layers=moe.first_dense_layers,
        model__moe__bias_update_rate=moe.bias_update_rate,
    )
    scale = moe.routed_scaling_factor
    require(scale > 0, f"model.moe.routed_scaling_factor={scale} must be positive")
    require(
        moe.first_dense_layers < model.num_layers,
        f"model.moe.first_dense_layers={moe.first_dense_layers} leaves no layer of model.num_layers={model.num_layers} "
        "for experts; lower it",
    )
    divides("model.moe.num_groups", moe.num_groups, "model.moe.num_experts", moe.num_experts)
    require(
        moe.group_top_k <= moe.num_groups,
        f"model.moe.group_top_k={moe.group_top_k} exceeds model.moe.num_groups={moe.num_groups}; lower it",
    )
    require(
        moe.top_k <= moe.group_top_k * (moe.num_experts // moe.num_groups),
        f"model.moe.top_k={moe.top_k} exceeds the experts of {moe.group_top_k} groups of "
        f"{moe.num_experts // moe.num_groups}; lower it or raise model.moe.group_top_k",
    )
    # The published rule ranks a group by its two best experts; Megatron-Core takes top_k // group_top_k of them.
    require(
        moe.num_groups == 1 or moe.top_k == 2 * moe.group_top_k,
        f"model.moe.top_k={moe.top_k} must be twice model.moe.group_top_k={moe.group_top_k}, as groups are ranked "
        f"by their two best experts; use top_k={2 * moe.group_top_k}, or num_groups=1 for no groups",
    )


def _check_data(config: Config) -> None:
    data, model = config.data, config.model
    at_least(2, data__sequence_length=data.sequence_length)
    at_least(1, data__document_alignment=data.document_alignment)
    at_least(0, data__num_workers=data.num_workers)
    divides("data.document_alignment", data.document_alignment, "data.sequence_length", data.sequence_length)
    require(
        data.sequence_length <= model.max_position_embeddings,
        f"data.sequence_length={data.sequence_length} exceeds "
        f"model.max_position_embeddings={model.max_position_embeddings}; shorten it",
    )
    one_of("data.block_origin", data.block_origin, ("document", "sequence"))
    one_of("data.clean_tokens", data.clean_tokens, ("needed", "all"))
    fraction = data.valid_fraction
    require(0 <= fraction <= 0.5, f"data.valid_fraction={fraction} is out of range; use 0 to 0.5")
    blends = {"data.train": data.train, "data.valid": data.valid}
    blends |= {f"curriculum.stages.{i}.data": stage.data or [] for i, stage in enumerate(config.curriculum.stages)}
    for key, blend in blends.items():
        for index, corpus in enumerate(blend):
            require(bool(corpus.path), f"{key}.{index}.path is empty; give the prefix of a .bin/.idx pair")
            require(
                corpus.weight > 0,
                f"{key}.{index}.weight={corpus.weight} must be positive; leave the corpus out instead",
            )
    require(
        bool(data.train) or all(stage.data for stage in config.curriculum.stages),
        "data.train is empty; give data.train=PREFIX, made with `llada-mega data build`",
    )


def _check_objective(key: str, objective: ObjectiveConfig) -> None:
    one_of(f"{key}.weighting", objective.weighting, ("elbo", "uniform"))
    one_of(f"{key}.schedule", objective.schedule, ("linear", "cosine"))
    one_of(f"{key}.level", objective.level, ("sequence", "document", "block"))
    low, high = objective.t_min, objective.t_max
    require(
        0 <= low < high <= 1,
        f"{key}.t_min={low} {key}.t_max={high} is no range of mask levels; use 0 <= t_min < t_max <= 1",
    )


def _check_curriculum(config: Config) -> None:
    stages = config.curriculum.stages
    require(
        bool(stages), "curriculum.stages is empty; choose a curriculum, as in curriculum=direct, or list the stages"
    )
    for index, stage in enumerate(stages):
        _check_stage(f"curriculum.stages.{index}", stage, config)


def _check_stage(key: str, stage: StageConfig, config: Config) -> None:
    length = config.data.sequence_length
    require(bool(stage.name), f"{key}.name is empty; name the stage")
    require(stage.tokens > 0, f"{key}.tokens={stage.tokens} trains on nothing; give the stage's data tokens")
    _check_block_size(f"{key}.block_size", stage.block_size, config)
    require(
        stage.sequence_length in (None, length),
        f"{key}.sequence_length={stage.sequence_length} differs from data.sequence_length={length}; packing cannot "
        "change within a run: leave it null, or continue in a new run",
    )
    if stage.objective is not None:
        _check_objective(f"{key}.objective", stage.objective.over(config.objective))
    lr = stage.lr
    one_of(f"{key}.lr.shape", lr.shape, ("constant", "linear", "cosine", "1-sqrt"))
    for name in ("start", "peak", "end", "warmup_tokens"):
        require(getattr(lr, name) >= 0, f"{key}.lr.{name}={getattr(lr, name)} is negative; use 0 or more")
    require(
        lr.shape != "constant" or lr.end in (1.0, lr.peak),
        f"{key}.lr.end={lr.end} has no effect with shape=constant; use linear, cosine or 1-sqrt",
    )
    require(
        lr.warmup_tokens <= stage.tokens,
        f"{key}.lr.warmup_tokens={lr.warmup_tokens} exceeds {key}.tokens={stage.tokens}; shorten the warm-up",
    )
    noise = stage.embedding_noise
    require(
        noise.decay_tokens >= 0, f"{key}.embedding_noise.decay_tokens={noise.decay_tokens} is negative; use 0 for none"
    )
    require(
        noise.std is None or noise.std >= 0,
        f"{key}.embedding_noise.std={noise.std} is negative; use null for the embedding table's own",
    )


def _check_block_size(key: str, block_size: int, config: Config) -> None:
    length = config.data.sequence_length
    require(
        1 <= block_size <= length,
        f"{key}={block_size} does not fit data.sequence_length={length}; use 1 to {length} (one block a document)",
    )
    if config.data.block_origin == "sequence":
        require(
            length % block_size == 0,
            f"{key}={block_size} does not divide data.sequence_length={length}, as data.block_origin=sequence needs; "
            "change either, or set data.block_origin=document",
        )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    require(0 < optimizer.lr < math.inf, f"optimizer.lr={optimizer.lr} must be a positive number")
    require(
        0 <= optimizer.min_lr <= optimizer.lr,
        f"optimizer.min_lr={optimizer.min_lr} is not between 0 and optimizer.lr={optimizer.lr}; lower it",
    )
    for key in ("beta1", "beta2"):
        beta = getattr(optimizer, key)
        require(0 <= beta < 1, f"optimizer.{key}={beta} is out of range; use 0 <= {key} < 1")
    require(optimizer.eps > 0, f"optimizer.eps={optimizer.eps} must be positive")
    at_least(0, optimizer__weight_decay=optimizer.weight_decay, optimizer__clip_grad=optimizer.clip_grad)


def _check_trainer(config: Config, world_size: int | None) -> None:
    trainer = config.trainer
    one_of("trainer.dtype", trainer.dtype, ("float32", "bfloat16"))
    check_fp8(trainer.fp8, trainer.dtype, config.model, config.parallel)
    at_least(
        1,
        trainer__max_steps=trainer.max_steps,
        trainer__global_batch_size=trainer.global_batch_size,
        trainer__micro_batch_size=trainer.micro_batch_size,
        trainer__log_every=trainer.log_every,
    )
    at_least(0, trainer__consistency_every=trainer.consistency_every, trainer__gc_every=trainer.gc_every)
    limit = trainer.exit_after
    require(limit is None or limit > 0, f"trainer.exit_after={limit} must be positive minutes; use null for no limit")
    hang, timeout = trainer.hang_minutes, config.parallel.timeout_minutes
    require(
        0 <= hang < timeout,
        f"trainer.hang_minutes={hang} is not below parallel.timeout_minutes={timeout}, after which collectives fail "
        "without a word on who is late; use 0 for no watchdog",
    )
    check_batches(trainer, config.parallel, world_size)
    stability = trainer.stability
    for key in ("nonfinite", "spike"):
        policy = getattr(stability, key)
        one_of(f"trainer.stability.{key}", policy, ("stop", "skip", "rollback", "warn"))
        require(
            policy != "rollback" or config.checkpoint.every > 0,
            f"trainer.stability.{key}=rollback needs checkpoints to go back to; set checkpoint.every",
        )
    factor = stability.spike_factor
    require(factor > 1, f"trainer.stability.spike_factor={factor} would call every step a spike; use more than 1")
    at_least(2, trainer__stability__spike_window=stability.spike_window)
    at_least(0, trainer__stability__max_skipped=stability.max_skipped)
    at_least(1, trainer__stability__max_rollbacks=stability.max_rollbacks)


def _check_validation(config: Config, world_size: int | None) -> None:
    validation, data = config.trainer.validation, config.data
    at_least(0, trainer__validation__every=validation.every)
    at_least(
        1,
        trainer__validation__windows=validation.windows,
        trainer__validation__noise_levels=validation.noise_levels,
        trainer__validation__batch_size=validation.batch_size,
    )
    if validation.every == 0:
        return
    if world_size is not None:
        ranks = data_parallel_size(config.parallel, world_size)
        require(
            validation.windows % ranks == 0,
            f"trainer.validation.windows={validation.windows} do not split over {ranks} data-parallel ranks; "
            f"use a multiple of {ranks}",
        )
    require(bool(validation.block_sizes), "trainer.validation.block_sizes is empty; give at least one, or set every=0")
    for index, block_size in enumerate(validation.block_sizes):
        _check_block_size(f"trainer.validation.block_sizes.{index}", block_size, config)
    require(
        bool(data.valid) or data.valid_fraction > 0,
        f"trainer.validation.every={validation.every} has nothing to read; set data.valid or data.valid_fraction",
    )


def _check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    at_least(0, checkpoint__every=checkpoint.every, checkpoint__keep_best=checkpoint.keep_best)
    at_least(1, checkpoint__keep_last=checkpoint.keep_last)
    at_least(0, checkpoint__merge_at_end=checkpoint.merge_at_end)
    require(bool(checkpoint.resume), "checkpoint.resume is empty; use auto, never or the path of a checkpoint")
    every = config.trainer.validation.every
    for key, count in (("keep_best", checkpoint.keep_best), ("merge_at_end", checkpoint.merge_at_end)):
        if not count:
            continue
        require(every > 0, f"checkpoint.{key}={count} needs validation; set trainer.validation.every")
        require(
            checkpoint.every > 0 and checkpoint.every % every == 0,
            f"checkpoint.{key}={count} needs a validation at every checkpoint, but checkpoint.every="
            f"{checkpoint.every} is no multiple of trainer.validation.every={every}; set checkpoint.every={every}",
        )
    if checkpoint.keep_best or checkpoint.merge_at_end:
        one_of("checkpoint.best_metric", checkpoint.best_metric, validation_metrics(config))
