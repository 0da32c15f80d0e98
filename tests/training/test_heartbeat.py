"""Heartbeats for ``ft_launcher``: sent where it watches, the package imported only there."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from llada_mega.errors import ConfigError
from llada_mega.training.callbacks.heartbeat import MONITOR_VARIABLE
from tests.training.conftest import Train


class RecordingClient:
    """The part of ``RankMonitorClient`` (nvidia-resiliency-ext 0.7) that is used; it refuses what the real one does."""

    calls: ClassVar[list[str]] = []

    def init_workload_monitoring(self) -> None:
        self.calls.append("init")

    def send_heartbeat(self) -> None:
        assert "init" in self.calls and "shutdown" not in self.calls
        self.calls.append("heartbeat")

    def shutdown_workload_monitoring(self) -> None:
        self.calls.append("shutdown")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[RecordingClient]:
    package, module = ModuleType("nvidia_resiliency_ext"), ModuleType("nvidia_resiliency_ext.fault_tolerance")
    module.RankMonitorClient = RecordingClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(RecordingClient, "calls", [])
    return RecordingClient


def test_one_heartbeat_a_step_where_it_is_watched(
    train: Train, monkeypatch: pytest.MonkeyPatch, client: type[RecordingClient]
) -> None:
    train("alone", "trainer.max_steps=1")
    assert client.calls == []
    monkeypatch.setenv(MONITOR_VARIABLE, "/nowhere")
    train("watched", "trainer.max_steps=3")
    assert client.calls == ["init", *["heartbeat"] * 3, "shutdown"]


def test_a_missing_package_is_named(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MONITOR_VARIABLE, "/nowhere")
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(ConfigError, match="nvidia-resiliency-ext cannot be imported"):
        train("run", "trainer.max_steps=1")
