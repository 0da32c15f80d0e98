"""How a run is put together: directory, processes, data, model, optimizer, resume, callbacks, loop."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.logging import RichHandler

from llada_mega.checkpoint.checkpoint import (
    load_model_weights,
    read_model_config,
    resolve_checkpoint,
    tokenizer_directory,
)
from llada_mega.config.curriculum import curriculum_of
from llada_mega.config.preflight import check_paths
from llada_mega.config.schema import Config
from llada_mega.errors import CheckpointError, TrainingError
from llada_mega.models import build_model
from llada_mega.parallel import ParallelGroups, destroy, initialize
from llada_mega.parallel.capabilities import Software, choose_software
from llada_mega.parallel.gpu_features import check_gpu_features
from llada_mega.ranks import StopSignals
from llada_mega.training.callback import Callback
from llada_mega.training.callbacks.checkpointing import CheckpointCallback
from llada_mega.training.callbacks.consistency import ConsistencyCallback
from llada_mega.training.callbacks.garbage import GarbageCallback
from llada_mega.training.callbacks.heartbeat import HeartbeatCallback, is_monitored
from llada_mega.training.callbacks.merging import MergeCallback
from llada_mega.training.callbacks.metrics import MetricsCallback, memory_gib
from llada_mega.training.callbacks.profiling import ProfileCallback
from llada_mega.training.callbacks.progress import ProgressCallback
from llada_mega.training.callbacks.sinks import JsonlSink, TensorBoardSink, WandbSink
from llada_mega.training.callbacks.stability import StabilityCallback
from llada_mega.training.callbacks.stopping import StopCallback
from llada_mega.training.callbacks.stragglers import StragglerCallback
from llada_mega.training.callbacks.validation import ValidationCallback
from llada_mega.training.callbacks.watchdog import Watchdog
from llada_mega.training.data import TrainingData
from llada_mega.training.dry_run import dry_run
from llada_mega.training.lock import only_run_in
from llada_mega.training.optimizer import build_optimizer, wrap_data_parallel
from llada_mega.training.outcome import Outcome, end_process, recorded
from llada_mega.training.redaction import redact
from llada_mega.training.resume import (
    agree_on_resume_point,
    check_contract,
    find_resume_point,
    first_difference,
    intact_resume_point,
    restore,
    run_contract,
    set_aside_newer,
)
from llada_mega.training.state import TrainState
from llada_mega.training.step import TrainStep
from llada_mega.training.trainer import Trainer

logger = logging.getLogger("llada_mega")


def run_training(config: Config, console: Console | None = None, signals: StopSignals | None = None) -> Outcome:
    """Train as ``config`` says; the same function on a laptop and under torchrun.

    Args:
        config: validated (:func:`llada_mega.config.validate.validate`).
        console: where progress goes on the first rank.
        signals: a signal noted there ends the run after the step at hand, saved.
    Returns:
        where the run ended, and why if it is to go on later.
    Raises:
        ConfigError, DataError, CheckpointError: the input does not fit together; nothing was trained.
        TrainingError: the run could not go on; its last checkpoint is intact.
    """
    began = time.monotonic()
    console = console or Console(highlight=False, soft_wrap=True)
    run_dir = Path(config.run.dir)
    outcome = Outcome()
    with only_run_in(run_dir), recorded(outcome, run_dir):
        # All that can be refused is checked before processes and weights cost time.
        dtype = getattr(torch, config.trainer.dtype)
        software = choose_software(config.model, config.parallel, dtype)
        check_gpu_features(config.model, config.parallel, dtype, config.trainer.fp8)
        check_paths(config)
        curriculum = curriculum_of(config)
        resume_from = find_resume_point(config, run_dir)
        init_from = initial_checkpoint(config) if resume_from is None else None
        data = TrainingData(config, curriculum)
        contract = run_contract(config, data.fingerprints())
        saved = check_contract(contract, curriculum, resume_from) if resume_from else None

        groups = initialize(config.parallel, seed=config.seed)
        try:
            agree_on_resume_point(resume_from, groups)
            passed_over: list[str] = []
            if resume_from is not None:
                newest, (resume_from, passed_over) = resume_from, intact_resume_point(config, resume_from, groups)
                if resume_from != newest:
                    saved = check_contract(contract, curriculum, resume_from)
            writes_files = groups.rank == 0
            if writes_files:
                write_config(config, run_dir, software)
                _log_to_console(console)
            random_weights = resume_from is None and init_from is None
            step = build_step(config, groups, init_from, software, random_weights=random_weights)
            guards = build_guards(config, run_dir, groups, outcome, signals, began)
            callbacks = build_callbacks(config, run_dir, data, console, groups.rank, guards)
            if resume_from is not None and saved is not None:
                state = restore(step, resume_from, saved, callbacks)
                logger.info(f"resumed from {resume_from} at step {state.step}")
            else:
                state = TrainState(embedding_rms=step.embedding_rms())
            if writes_files and (newer := set_aside_newer(run_dir / "checkpoints", state.step)):
                logger.warning(
                    f"moved {len(newer)} checkpoints beyond step {state.step} to {run_dir}/checkpoints/superseded"
                )
            trainer = Trainer(
                config=config,
                step=step,
                curriculum=curriculum,
                contract=contract,
                state=state,
                batches=data.batches(state.consumed_samples, rank=groups.dp.rank(), world_size=groups.dp.size()),
                callbacks=callbacks,
                writes_files=writes_files,
            )
            for line in passed_over:
                trainer.warn(line)
            if config.trainer.dry_run or (config.trainer.dry_run is None and groups.device.type == "cuda"):
                stage = dry_run(step, config, curriculum, data.options)
                logger.info(f"dry run of stage {stage.name}: {memory_gib():.1f} GiB at the peak")
            outcome.state = state  # of the trainer's, kept up to date
            trainer.fit()
            outcome.stop_reason = None if trainer.is_finished else trainer.stop_reason
            return outcome
        except OSError as error:  # a full disk, a vanished mount: nothing that a traceback would explain better
            where = error.filename or run_dir
            raise TrainingError(
                f"{where}: {error.strerror or error}; the run stops, its last checkpoint is intact"
            ) from error
        finally:
            destroy()


def initial_checkpoint(config: Config) -> Path | None:
    """The checkpoint of ``trainer.init``, checked against the model.

    Raises:
        CheckpointError: it is missing or incomplete, or holds another model.
    """
    if config.trainer.init is None:
        return None
    path = resolve_checkpoint(Path(config.trainer.init))
    stored, wanted = (dataclasses.asdict(m) for m in (read_model_config(path), config.model))
    for free in ("attention_backend", "implementation", "init_std"):
        stored.pop(free), wanted.pop(free)
    difference = first_difference(stored, wanted, "model")
    if difference is not None:
        key, old, new = difference
        raise CheckpointError(
            f"trainer.init={path} has {key}={old!r}, the configuration has {new!r}; use model=from_init to take the "
            f"checkpoint's model, or set {key}={old}"
        )
    return path


def write_config(config: Config, run_dir: Path, software: Software) -> None:
    """``RUN/config.yaml``: resolved, secrets redacted, and what it came to on this machine."""
    content = dataclasses.asdict(config) | {"software": dataclasses.asdict(software)}
    text = yaml.safe_dump(content, sort_keys=False)
    (run_dir / "config.yaml").write_text(redact(text))


def build_step(
    config: Config, groups: ParallelGroups, init_from: Path | None, software: Software, *, random_weights: bool
) -> TrainStep:
    """This rank's model chunks, their data-parallel wrappers and the optimizer."""
    if config.trainer.deterministic:
        torch.use_deterministic_algorithms(True)
    dtype = getattr(torch, config.trainer.dtype)
    seed = config.seed if random_weights else None  # None: not initialised, they are loaded next
    # Fused only here, where data parallelism gives every weight a gradient buffer.
    fused = software.gradient_accumulation_fusion
    parallel = dataclasses.replace(config.parallel, gradient_accumulation_fusion=fused)
    stages = [None] if parallel.vp is None else range(parallel.vp)
    fp8 = config.trainer.fp8
    models = [
        build_model(config.model, parallel=parallel, dtype=dtype, fp8=fp8, seed=seed, groups=groups, vp_stage=stage)
        for stage in stages
    ]
    for model in models:
        model.to(groups.device)
    if init_from is not None:
        load_model_weights(init_from, *models)
    chunks = wrap_data_parallel(models, parallel)
    optimizer = build_optimizer(config.optimizer, chunks, parallel, dtype)
    return TrainStep(chunks, optimizer, groups, seed=config.seed, device=groups.device)


def build_guards(
    config: Config, run_dir: Path, groups: ParallelGroups, outcome: Outcome, signals: StopSignals | None, began: float
) -> list[Callback]:
    """What ends a run before its last step: a request to stop, a standstill."""
    guards: list[Callback] = [StopCallback(run_dir, config.trainer.exit_after, signals, began)]
    if config.trainer.hang_minutes:
        end = partial(end_process, outcome, run_dir)
        guards.append(Watchdog(run_dir, groups.rank, groups.world_size, 60 * config.trainer.hang_minutes, end))
    if is_monitored():
        guards.append(HeartbeatCallback())
    return guards


def build_callbacks(
    config: Config, run_dir: Path, data: TrainingData, console: Console, rank: int, guards: Sequence[Callback] = ()
) -> list[Callback]:
    """Features in the order of their hooks.

    Validation comes before the checkpoint that stores its result, merging after the guards: it may take its time.
    """
    writes_files = rank == 0
    metrics = MetricsCallback(config.logging.peak_tflops)
    callbacks: list[Callback] = [metrics, StabilityCallback(config.trainer.stability)]
    if config.logging.profile.start and rank in config.logging.profile.ranks:
        callbacks.append(ProfileCallback(run_dir, config.logging.profile, rank))
    if config.trainer.consistency_every:
        callbacks.append(ConsistencyCallback(config.trainer.consistency_every))
    if config.trainer.validation.every:
        callbacks.append(ValidationCallback(config.trainer.validation, data.validation_samples, config.seed))
    callbacks.append(CheckpointCallback(run_dir, config.checkpoint, tokenizer_source(config)))
    callbacks.extend(guards)
    if config.trainer.gc_every:
        callbacks.append(GarbageCallback(config.trainer.gc_every))
    if config.checkpoint.merge_at_end:
        callbacks.append(MergeCallback(run_dir, config.checkpoint))
    callbacks += [StragglerCallback(), JsonlSink(run_dir)]
    if writes_files and config.logging.progress:
        callbacks.append(ProgressCallback(console))
    if writes_files and config.logging.tensorboard:
        callbacks.append(TensorBoardSink(run_dir))
    if writes_files and config.logging.wandb:
        plain: dict[str, Any] = yaml.safe_load(redact(yaml.safe_dump(dataclasses.asdict(config))))
        callbacks.append(WandbSink(run_dir, plain, config.logging, config.run.name))
    return callbacks


def tokenizer_source(config: Config) -> Path | None:
    """Where checkpoints take their tokenizer files from: ``data.tokenizer``, else the initial checkpoint."""
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    return tokenizer_directory(resolve_checkpoint(Path(config.trainer.init))) if config.trainer.init else None


def _log_to_console(console: Console) -> None:
    if not logger.handlers:
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
