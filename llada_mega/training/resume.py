"""What a checkpoint of a run holds, and how a run continues from one, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llada_mega import __version__
from llada_mega.checkpoint import storage
from llada_mega.checkpoint.checkpoint import (
    STEP_PREFIX,
    has_intact_state,
    list_checkpoints,
    load_model_state,
    model_state,
    read_state,
    resolve_checkpoint,
    step_name,
    verify,
    verify_small_files,
)
from llada_mega.checkpoint.optimizer_state import set_adam_step, sharded_adam_state
from llada_mega.config.schema import Config
from llada_mega.diffusion.curriculum import Curriculum
from llada_mega.errors import CheckpointError
from llada_mega.parallel import ParallelGroups
from llada_mega.training.callback import Callback
from llada_mega.training.state import TrainState
from llada_mega.training.step import TrainStep
from llada_mega.training.trainer import Trainer


def sharded_training_state(step: TrainStep) -> dict[str, Any]:
    """The sharded state of this rank's weights and optimizer, as views of them. A collective."""
    step.gather_parameters()
    model = model_state(step.bare_models)
    return {"model": model, "optimizer": sharded_adam_state(step.optimizer, model)}


def collect_state(trainer: Trainer) -> dict[str, Any]:
    """Everything of a run that is no tensor, for ``state.json``."""
    return {
        "llada_mega": __version__,
        "train": trainer.state.to_json(),
        "contract": trainer.contract,
        "curriculum": trainer.curriculum.to_json(),
        "callbacks": {c.name: c.state_dict() for c in trainer.callbacks if c.state_dict()},
        "optimizer": {"step": trainer.step.num_updates},
    }


def run_contract(config: Config, corpora: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What must not change between the parts of a run, because loss, data and noise depend on it.

    ``corpora`` are the fingerprints of what is trained on (``TrainingData.fingerprints``).
    """
    model = dataclasses.asdict(config.model)
    for key in ("attention_backend", "implementation"):  # how, not what
        model.pop(key)
    data = dataclasses.asdict(config.data)
    for key in ("num_workers", "tokenizer", "valid"):
        data.pop(key)
    if not config.model.is_moe:  # there, clean tokens that nobody sees count in the load that moves the experts' biases
        data.pop("clean_tokens")
    data["valid_fraction"] = 0.0 if config.data.valid else config.data.valid_fraction
    for corpus in data["train"]:
        corpus["path"] = Path(corpus["path"]).name  # a directory may have moved
    return {
        "seed": config.seed,
        "model": model,
        "data": data,
        "corpora": corpora,
        "trainer": {name: getattr(config.trainer, name) for name in ("global_batch_size", "dtype", "fp8")},
        "optimizer": dataclasses.asdict(config.optimizer),
    }


def find_resume_point(config: Config, run_dir: Path) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` means, or None for a fresh start.

    ``auto`` takes the newest of the run directory. Of tensors only the lengths are looked at: see
    :func:`newest_intact`.

    Raises:
        CheckpointError: an explicit path is not a complete checkpoint, or the run has checkpoints and none is.
    """
    choice = config.checkpoint.resume
    if choice == "never":
        return None
    if choice != "auto":
        return resolve_checkpoint(Path(choice))
    root = run_dir / "checkpoints"
    usable = [path for path in list_checkpoints(root) if has_intact_state(path)]
    if not usable and any(root.glob(f"{STEP_PREFIX}*")):
        raise _all_damaged(root)
    return usable[-1] if usable else None


def agree_on_resume_point(found: Path | None, groups: ParallelGroups) -> None:
    """Make sure that all ranks go on from the same checkpoint, or all from the start. A collective.

    Raises:
        CheckpointError: they do not: their file systems differ, or one is not up to date.
    """
    points: list[Path | None] = [None] * groups.world_size
    dist.all_gather_object(points, found)
    others = [rank for rank, point in enumerate(points) if point != points[0]]
    if others:
        first, other = (points[rank] or "the start" for rank in (0, others[0]))
        raise CheckpointError(
            f"rank 0 goes on from {first}, rank {others[0]} from {other}; run.dir has to be on storage that all nodes "
            "share"
        )


def intact_resume_point(config: Config, found: Path, groups: ParallelGroups) -> tuple[Path, list[str]]:
    """What to resume from in place of what was ``found``, after reading all of it, and what to tell the user.

    Raises:
        CheckpointError: the checkpoint that ``checkpoint.resume`` names is damaged, or all of the run's are.
    """
    if config.checkpoint.resume == "auto":
        return newest_intact(found.parent, groups)
    problems = damage(found, groups)
    if problems:
        raise CheckpointError(f"checkpoint.resume={found} is damaged: {problems[0]}; use another one or auto")
    return found, []


def newest_intact(root: Path, groups: ParallelGroups) -> tuple[Path, list[str]]:
    """The newest checkpoint under ``root`` of which every byte is as it was written. A collective.

    Returns:
        the checkpoint, and a line about each newer one that was passed over.
    Raises:
        CheckpointError: all are damaged.
    """
    passed_over: list[str] = []
    for path in reversed(_from_first_rank(sorted(root.glob(f"{STEP_PREFIX}*")))):
        problems = damage(path, groups)
        if not problems:
            return path, passed_over
        passed_over.append(f"{path} is damaged ({problems[0]}); taking the checkpoint before it")
    raise _all_damaged(root)


def damage(checkpoint: Path, groups: ParallelGroups) -> list[str]:
    """All that is wrong with a checkpoint, on every rank; the ranks share the reading. A collective."""
    found: list[list[str] | None] = [None] * groups.world_size
    dist.all_gather_object(found, verify(checkpoint, groups.rank, groups.world_size))
    return sorted({problem for problems in found for problem in problems or []})


def _from_first_rank(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _all_damaged(root: Path) -> CheckpointError:
    newest = max(root.glob(f"{STEP_PREFIX}*"))
    problem, *_ = [*verify_small_files(newest), "its tensors"]
    return CheckpointError(
        f"every checkpoint in {root} is damaged ({newest.name}: {problem}); `llada-mega checkpoint verify` names the "
        "files; checkpoint.resume=never starts over and keeps them in superseded/"
    )


def check_contract(contract: dict[str, Any], curriculum: Curriculum, checkpoint: Path) -> dict[str, Any]:
    """Read ``state.json`` and refuse a resume that would silently change the run.

    Raises:
        CheckpointError: naming the first key that differs, with both values.
    """
    state = read_state(checkpoint)
    if "train" not in state:
        raise CheckpointError(
            f"{checkpoint} holds weights but no training state; start from it with trainer.init={checkpoint}"
        )
    advice = "set it back, or start a new run (run.name=...) with trainer.init"
    # Through JSON once, so that tuples and lists, ints and floats compare as they were stored.
    difference = first_difference(state["contract"], json.loads(json.dumps(contract)))
    if difference is not None:
        key, old, new = difference
        raise CheckpointError(f"cannot resume from {checkpoint}: {key} was {old!r} and is now {new!r}; {advice}")
    message = Curriculum.from_json(state["curriculum"]).difference(curriculum)
    if message is not None:
        raise CheckpointError(f"cannot resume from {checkpoint}: {message}; {advice}")
    return state


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Dotted key and both values of the first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)


def set_aside_newer(root: Path, step: int) -> list[Path]:
    """Move checkpoints beyond ``step`` to ``superseded``: this run goes another way from here.

    Left in place, an older run's later checkpoint would count as the newest one. Nothing is removed, damaged ones
    neither.
    """
    newer = [path for path in sorted(root.glob(f"{STEP_PREFIX}*")) if path.name > step_name(step)]
    for path in newer:
        target = root / "superseded" / path.name
        while target.exists():
            target = target.with_name(target.name + "_")
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    return newer


def restore(step: TrainStep, checkpoint: Path, state: dict[str, Any], callbacks: list[Callback]) -> TrainState:
    """Load weights, optimizer and callback states; returns where the run stands."""
    sharded = sharded_training_state(step)
    adam = {name: shard.data for name, shard in sharded["optimizer"].items()}
    loaded = storage.load(checkpoint, sharded)
    load_model_state(step.bare_models, loaded["model"])
    with torch.no_grad():
        for name, view in adam.items():
            view.copy_(loaded["optimizer"][name])
    step.num_updates = int(state["optimizer"]["step"])
    set_adam_step(step.optimizer, step.num_updates)
    for callback in callbacks:
        if callback.name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][callback.name])
    return TrainState(**state["train"])
