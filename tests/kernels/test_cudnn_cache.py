"""Where compiled cuDNN kernels are kept, and that one process compiles while the others wait."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llada_kernels.backends import cudnn_cache

# One rank: "compiles" what it does not find on the disk, slowly enough for the others to arrive.
RANK = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("cudnn_cache", sys.argv[2])  # on its own: no PyTorch to import
cudnn_cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cudnn_cache)
directory = cudnn_cache.enable("sm_90")
kernel = directory / "kernel.o"
for _ in range(2):
    with cudnn_cache.first_use("kernel"):
        found = kernel.exists()
        if not found:
            print("a line of the package")
            (directory / "compiling").touch()
            time.sleep(float(sys.argv[1]))
            assert not kernel.exists()
            kernel.touch()
    os.write(1, b"loaded\\n" if found else b"compiled\\n")
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No state of this process or of the user."""
    for name in (cudnn_cache.ENABLED_VARIABLE, cudnn_cache.DIRECTORY_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv(cudnn_cache.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cudnn_cache, "_directory", None)
    monkeypatch.setattr(cudnn_cache, "_compiled", set())
    monkeypatch.setattr(cudnn_cache, "installed_version", lambda: "1.2.3")


def start_rank(seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RANK, str(seconds), str(cudnn_cache.__file__)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_rank_compiles_and_the_others_load(tmp_path: Path) -> None:
    ranks = [start_rank(1.0) for _ in range(3)]
    results = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], results
    firsts = sorted(out.split()[0] for out, _ in results)
    assert firsts == ["compiled", "loaded", "loaded"]
    assert [err.count("a line of the package") for _, err in sorted(results)] == [1, 0, 0]
    assert all("a line of the package" not in out for out, _ in results)  # standard output is the program's


def test_a_rank_that_is_killed_while_it_compiles_holds_up_nobody(tmp_path: Path) -> None:
    first = start_rank(600.0)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/sm_90/compiling")) and time.monotonic() < deadline:
        time.sleep(0.02)
    second = start_rank(0.0)
    time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    out, err = second.communicate(timeout=60)
    first.communicate()
    assert (second.returncode, out.split()[0]) == (0, "compiled"), err


def test_a_directory_for_each_version_and_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cudnn_cache.cache_directory("sm_90") == tmp_path / "cudnn-1.2.3" / "sm_90"
    monkeypatch.delenv(cudnn_cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cudnn_cache.cache_directory("sm_100") == Path("/elsewhere/llada-mega/kernels/cudnn-1.2.3/sm_100")


def test_the_package_is_told(tmp_path: Path) -> None:
    directory = cudnn_cache.enable("sm_100")
    assert directory == tmp_path / "cudnn-1.2.3" / "sm_100" and directory.is_dir()
    assert os.environ[cudnn_cache.ENABLED_VARIABLE] == "1"
    assert os.environ[cudnn_cache.DIRECTORY_VARIABLE] == str(directory)


def test_the_users_choice_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cudnn_cache.ENABLED_VARIABLE, "0")
    assert cudnn_cache.enable("sm_90") is None
    monkeypatch.setenv(cudnn_cache.ENABLED_VARIABLE, "1")
    monkeypatch.setenv(cudnn_cache.DIRECTORY_VARIABLE, str(tmp_path / "mine"))
    assert cudnn_cache.enable("sm_90") == tmp_path / "mine"
    assert os.environ[cudnn_cache.DIRECTORY_VARIABLE] == str(tmp_path / "mine")


@pytest.mark.parametrize("lockable", [True, False])
def test_without_a_directory_every_process_compiles(
    lockable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if lockable:
        (tmp_path / "cudnn-1.2.3").write_text("a file where the directory should be")
    else:
        monkeypatch.setattr(cudnn_cache.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(95, "no locks")))
    with caplog.at_level(logging.WARNING):
        assert cudnn_cache.enable("sm_90") is None
    assert cudnn_cache.CACHE_VARIABLE in caplog.text and cudnn_cache.ENABLED_VARIABLE not in os.environ
    with cudnn_cache.first_use("kernel"):
        pass


def test_a_failed_first_use_is_tried_again_under_the_lock() -> None:
    directory = cudnn_cache.enable("sm_90")
    assert directory is not None
    with pytest.raises(RuntimeError, match="out of memory"), cudnn_cache.first_use("kernel"):
        raise RuntimeError("out of memory")
    assert "kernel" not in cudnn_cache._compiled
    with cudnn_cache.first_use("kernel"):
        pass
    assert "kernel" in cudnn_cache._compiled
