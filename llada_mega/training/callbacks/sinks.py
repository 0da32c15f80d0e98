"""Where rows of metrics go: metrics.jsonl always, TensorBoard and wandb by switch."""

from __future__ import annotations

import json
import math
import os
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llada_mega.config.training import LoggingConfig
from llada_mega.errors import ConfigError
from llada_mega.training.callback import Callback
from llada_mega.training.redaction import redact, redacted_arguments
from llada_mega.training.trainer import Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class JsonlSink(Callback):
    """``RUN/metrics.jsonl``: one JSON object a row, flushed at once; a resumed run appends."""

    name = "jsonl"

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._file: TextIO | None = None

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if not trainer.writes_files:
            return
        if self._file is None:
            cut_torn_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(redact(json.dumps(finite(row))) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def cut_torn_line(path: Path) -> None:
    """Remove what a process has left of a last line that a full disk or a crash kept from its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


class TensorBoardSink(Callback):
    """``RUN/tensorboard``: every number of a row as a scalar; steps made again after a resume replace the old ones."""

    name = "tensorboard"

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logging.tensorboard=true needs the package tensorboard; pip install 'llada-mega[logging]'"
            ) from error
        self._open = partial(SummaryWriter, str(run_dir / "tensorboard"))
        self._writer: SummaryWriter | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        self._writer = self._open(purge_step=trainer.state.step + 1)

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        assert self._writer is not None
        for key, value in flatten(row).items():
            self._writer.add_scalar(key, value, trainer.state.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink(Callback):
    """Weights & Biases; offline unless ``logging.wandb_mode=online``.

    The id of the wandb run is in every checkpoint, so a resumed run goes on in it. Its steps go back then, which
    wandb's own counter cannot: rows are drawn over their key ``step`` instead.
    """

    name = "wandb"

    def __init__(self, run_dir: Path, config: dict[str, Any], logging: LoggingConfig, run_name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logging.wandb=true needs the package wandb; pip install 'llada-mega[logging]'"
            ) from error
        has_key = bool(os.environ.get("WANDB_API_KEY")) or Path("~/.netrc").expanduser().exists()
        if logging.wandb_mode == "online" and not has_key:
            raise ConfigError("logging.wandb_mode=online needs WANDB_API_KEY; set it or use logging.wandb_mode=offline")
        self._wandb = wandb
        self._arguments: dict[str, Any] = {
            "dir": str(run_dir),
            "config": config,
            "project": redact(logging.wandb_project),
            "group": redact(logging.wandb_group) if logging.wandb_group else None,
            "mode": logging.wandb_mode,
            "name": redact(run_name),
        }
        self._id: str | None = None
        self._run: Any = None

    def on_train_begin(self, trainer: Trainer) -> None:
        if trainer.writes_files:
            self._id = self._id or uuid.uuid4().hex[:8]
            with redacted_arguments():  # wandb stores the command line
                self._run = self._wandb.init(id=self._id, resume="allow", **self._arguments)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(flatten(row))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if sys.exception() is None else 1)

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]


def finite(value: Any) -> Any:
    """The same value with NaN and infinities as strings: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested row under slash-joined names."""
    out: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float):
            out[f"{prefix}{key}"] = float(value)
    return out
