"""What a valid configuration still needs: its files, and a directory to write to."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llada_mega.config.data import Corpus
from llada_mega.config.schema import Config
from llada_mega.errors import CheckpointError, ConfigError, DataError


def check_paths(config: Config) -> None:
    """Checks that what the run reads exists and that it can write to ``run.dir``, which is made.

    Raises DataError, CheckpointError or ConfigError with the key and the path.
    """
    _check_corpora("data.train", config.data.train)
    _check_corpora("data.valid", config.data.valid)
    for index, stage in enumerate(config.curriculum.stages):
        _check_corpora(f"curriculum.stages.{index}.data", stage.data or [])
    tokenizer = config.data.tokenizer
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise DataError(f"data.tokenizer={tokenizer}: no tokenizer.json there; name a directory that has one")
    init, resume = config.trainer.init, config.checkpoint.resume
    if init is not None and not Path(init).is_dir():
        raise CheckpointError(f"trainer.init={init}: no such checkpoint; make it with `llada-mega convert import`")
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise CheckpointError(
            f"checkpoint.resume={resume}: no such checkpoint; use auto, never or a checkpoint directory"
        )
    check_writable(config.run.dir)


def _check_corpora(key: str, corpora: list[Corpus]) -> None:
    for index, corpus in enumerate(corpora):
        for suffix in (".bin", ".idx"):
            if not Path(corpus.path + suffix).is_file():
                raise DataError(
                    f"{key}.{index}.path={corpus.path}: there is no {corpus.path}{suffix}; "
                    "build it with `llada-mega data build`"
                )


def check_writable(directory: str) -> None:
    """Makes ``run.dir`` and writes to it once. Raises ConfigError."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"run.dir={directory} cannot be written to ({reason}); choose another directory") from error
