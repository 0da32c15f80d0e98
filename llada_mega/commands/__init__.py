"""The commands of the command line, one module each. They hold options and call the library; they compute nothing."""

from __future__ import annotations

from llada_mega.commands import (
    checkpoint_inspect,
    checkpoint_verify,
    convert_export,
    convert_import,
    data_build,
    doctor,
    eval,
    generate,
    mask,
    merge,
    plan,
    quickstart,
    report,
    train,
)
from llada_mega.commands.base import Command

COMMANDS: tuple[Command, ...] = tuple(
    module.COMMAND
    for module in (
        quickstart,
        data_build,
        convert_import,
        convert_export,
        train,
        eval,
        generate,
        report,
        mask,
        merge,
        plan,
        checkpoint_verify,
        checkpoint_inspect,
        doctor,
    )
)
