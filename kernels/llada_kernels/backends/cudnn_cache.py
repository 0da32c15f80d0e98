"""One directory of compiled cuDNN kernels for each architecture, and one process that compiles while others wait.

``cudnn.flex_attention`` compiles its kernels when they are first called, and can keep them on disk. Left alone, the
ranks of a node would all find the disk empty and compile the same kernels side by side; and since the keys of some
kernels leave out the architecture, two kinds of GPU must not share a directory.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

log = logging.getLogger(__name__)

PACKAGE = "nvidia-cudnn-frontend"
CACHE_VARIABLE = "LLADA_KERNELS_CACHE"
# What the package reads when it is imported.
ENABLED_VARIABLE = "FLEX_ATTENTION_CUTE_DSL_CACHE_ENABLED"
DIRECTORY_VARIABLE = "FLEX_ATTENTION_CUTE_DSL_CACHE_DIR"

_directory: Path | None = None
_compiled: set[Hashable] = set()


def installed_version() -> str | None:
    """Version of the installed package, None when there is none; imports nothing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def cache_directory(architecture: str) -> Path:
    """``$LLADA_KERNELS_CACHE/cudnn-<version>/<architecture>``, by default below ``$XDG_CACHE_HOME/llada-mega``."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get(CACHE_VARIABLE) or user / "llada-mega" / "kernels")
    return root / f"cudnn-{installed_version()}" / architecture


def enable(architecture: str) -> Path | None:
    """Make the package keep its kernels in ``cache_directory``; call it before ``cudnn.flex_attention`` is imported.

    Without a directory that can be written and locked the package compiles for this process only, which is slower and
    as right. The package's own variables, where somebody has set them, decide.

    Returns:
        The directory, None when kernels are not kept.
    """
    global _directory
    directory = cache_directory(architecture)
    if ENABLED_VARIABLE in os.environ:
        if os.environ[ENABLED_VARIABLE] != "1" or DIRECTORY_VARIABLE not in os.environ:
            return None
        directory = Path(os.environ[DIRECTORY_VARIABLE])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory):  # some network file systems have no locks, and the package cannot do without
            pass
    except OSError as error:
        log.warning("attention kernels are compiled by every process: %s; set %s elsewhere", error, CACHE_VARIABLE)
        return None
    os.environ |= {ENABLED_VARIABLE: "1", DIRECTORY_VARIABLE: str(directory)}
    _directory = directory
    return directory


@contextmanager
def first_use(kernels: Hashable) -> Iterator[None]:
    """Around the first use of some kernels in this process, which compiles them or loads them from the disk.

    The first process that gets here compiles; the others wait and find the kernels on the disk. The lock ends with its
    holder, however that ends. Later uses of the same kernels cost nothing.
    """
    if kernels in _compiled:
        yield
        return
    with redirect_stdout(sys.stderr):  # the package prints a line for each kernel
        if _directory is None:
            yield
        else:
            with _lock(_directory):
                yield
    _compiled.add(kernels)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with (directory / "compile.lock").open("w") as file:  # closing it releases the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for the process that compiles attention kernels into %s", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
