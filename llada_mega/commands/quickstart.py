"""``llada-mega quickstart``: the whole story on this machine."""

from __future__ import annotations

from llada_mega.commands.base import Command
from llada_mega.config.preflight import check_writable
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.errors import ConfigError


def check(config: Config) -> None:
    """Checks the configuration; the files that it names are made by the quickstart itself."""
    validate(config)
    if config.launch.nproc != 1:
        raise ConfigError(f"launch.nproc={config.launch.nproc}: the quickstart runs in one process; use launch.nproc=1")
    if len(config.data.train) != 2 or len(config.data.valid) != 1:
        raise ConfigError(
            "the quickstart makes two training corpora (prose, sources) and one held-out corpus; leave data.train and "
            "data.valid as they are, or use `llada-mega train` with your own"
        )
    check_writable(config.run.dir)


def run(config: Config) -> int:
    """Downloads, converts, measures, trains, measures again, generates, exports and reports."""
    from llada_mega.quickstart.story import main

    return main(config)


COMMAND = Command(
    name="quickstart",
    summary="turn a small real model into a block-diffusion model here and now, and show it",
    example="llada-mega quickstart\nllada-mega quickstart experiment=quickstart_moe run.dir=runs/moe",
    options=Config,
    run=run,
    check=check,
    presets=("experiment=quickstart",),
)
