"""The command line: ``llada-mega <command> [key=value ...]``. Nothing else in the project reads it.

Exit status: 0 done, 2 a user's mistake (one line on stderr), 1 a defect of ours (with its traceback), 85 training
was asked to stop and can go on later, 130 interrupted.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llada_mega.commands import COMMANDS
from llada_mega.commands.base import Command
from llada_mega.commands.processes import start_processes
from llada_mega.config.compose import compose, compose_yaml, expand_sweep, is_swept, list_override
from llada_mega.config.schema import Config
from llada_mega.errors import ConfigError, LladaMegaError
from llada_mega.ranks import has_launcher, record_failure

FLAGS = "--help, --cfg job and --multirun"


@dataclass
class Invocation:
    """What was typed, taken apart."""

    command: Command
    overrides: list[str] = field(default_factory=list)
    print_config: bool = False
    multirun: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; never raises for what a user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Megatron-Core warns at import of what is optional and not installed, half a page of it.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed", category=UserWarning)
    try:
        return _main(arguments)
    except LladaMegaError as error:
        if not record_failure(error):
            if os.environ.get("LLADA_MEGA_DEBUG") == "1":
                traceback.print_exception(error)
            rank = os.environ.get("RANK", "0")
            print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not has_launcher():
            print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if record_failure(error):
            return 1
        raise


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    command, rest = _find_command(arguments)
    if "--help" in rest or "-h" in rest:
        print(command.help())
        return 0
    invocation = _parse(command, rest)
    if invocation.multirun:
        return _run_jobs(invocation)
    if invocation.print_config:
        print(compose_yaml(command.options, invocation.overrides), end="")
        return 0
    options: Any = compose(command.options, invocation.overrides)
    command.check(options)
    if command.distributed and options.launch.nproc > 1 and "RANK" not in os.environ:
        return start_processes(options.launch.nproc, [*command.name.split(), *invocation.overrides], options.run.dir)
    return command.run(options)


def _overview() -> str:
    width = max(len(command.name) for command in COMMANDS)
    return "\n".join(
        [
            "usage: llada-mega <command> [key=value ...]",
            "",
            "Turns autoregressive language models into block-diffusion language models.",
            "",
            *(f"  {command.name:{width}}  {command.summary}" for command in COMMANDS),
            "",
            f"flags: {FLAGS}",
            "`llada-mega <command> --help` shows a command's keys and an example; start with `llada-mega quickstart`.",
        ]
    )


def _find_command(arguments: list[str]) -> tuple[Command, list[str]]:
    """The command that the first one or two words name, and what follows them."""
    by_name = {command.name: command for command in COMMANDS}
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if len(arguments) >= words and name in by_name:
            return by_name[name], arguments[words:]
    first = arguments[0]
    members = [command.name for command in COMMANDS if command.name.split()[0] == first]
    if members:
        raise ConfigError(f"'{first}' is not a command by itself; there are: {', '.join(members)}")
    close = difflib.get_close_matches(first, list(by_name), n=1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    raise ConfigError(f"unknown command '{first}'; {hint}: {', '.join(by_name)}")


def _parse(command: Command, arguments: list[str]) -> Invocation:
    invocation = Invocation(command)
    bare: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument in ("--multirun", "-m"):
            invocation.multirun = True
        elif argument == "--cfg" or argument.startswith("--cfg="):
            value = argument.partition("=")[2] or (waiting.pop(0) if waiting else "")
            if value != "job":
                raise ConfigError(f"--cfg {value} is not supported; use --cfg job".replace("  ", " "))
            invocation.print_config = True
        elif argument.startswith("-"):
            raise ConfigError(f"unknown flag {argument}; flags are {FLAGS}, everything else is key=value")
        elif "=" in argument or argument.startswith("~"):
            invocation.overrides.append(argument)
        elif command.positional and (command.many or not bare):
            bare.append(argument)
        elif command.positional:
            raise ConfigError(f"cannot read {argument!r}: one path is enough, everything else is key=value")
        else:
            invocation.overrides.append(argument)  # compose explains what is wrong with it
    if bare:
        key = str(command.positional)
        invocation.overrides.insert(0, list_override(key, bare) if bare[1:] else f"{key}={bare[0]}")
    typed = {override.lstrip("+").partition("=")[0] for override in invocation.overrides}
    presets = [preset for preset in command.presets if preset.partition("=")[0] not in typed]
    invocation.overrides = presets + invocation.overrides
    return invocation


def _run_jobs(invocation: Invocation) -> int:
    """Runs every job of a sweep one after the other, each in a process of its own; all are checked before the first.

    A run writes to ``<run.dir>/<job number>`` unless the sweep itself gives every job its own name or directory.
    """
    command = invocation.command
    jobs = expand_sweep(command.options, invocation.overrides)
    if any(name in os.environ for name in ("RANK", "WORLD_SIZE")):
        raise ConfigError("--multirun starts its own processes and cannot run under torchrun; use launch.nproc")
    numbered = command.options is Config and not is_swept(jobs, "run.name") and not is_swept(jobs, "run.dir")
    for index, job in enumerate(jobs):
        try:
            options: Any = compose(command.options, job)
            if numbered:
                directory = f"{options.run.dir}/{index}"
                job[:] = [override for override in job if not override.startswith("run.dir=")] + [
                    f"run.dir={directory}"
                ]
                options = compose(command.options, job)
            if not invocation.print_config:
                command.check(options)
        except LladaMegaError as error:
            raise type(error)(f"job {index} ({' '.join(job)}): {error}") from error
    failed = []
    for index, job in enumerate(jobs):
        print(f"job {index + 1} of {len(jobs)}: {' '.join(job)}", flush=True)
        if invocation.print_config:
            print(compose_yaml(command.options, job))
        elif subprocess.run([sys.executable, "-m", "llada_mega", *command.name.split(), *job], check=False).returncode:
            failed.append(index)
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(map(str, failed))}; their errors are above"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
