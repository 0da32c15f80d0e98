"""``llada-mega quickstart``: the whole story on this machine."""

from __future__ import annotations

from llada_mega.commands.base import Command
from llada_mega.config.preflight import check_supported
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate


def check(config: Config) -> None:
    """Checks the configuration; the files that it names are made by the quickstart itself."""
    validate(config)
    check_supported(config)


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
