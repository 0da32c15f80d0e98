"""Signs of life for NVIDIA's resiliency extension (nvidia-resiliency-ext), where it watches."""

from __future__ import annotations

import os
from typing import Any

from llada_mega.errors import ConfigError
from llada_mega.training.callback import Callback
from llada_mega.training.trainer import Trainer

# Set by the extension's ft_launcher for every rank: the socket of the process that watches it.
MONITOR_VARIABLE = "FT_RANK_MONITOR_IPC_SOCKET"


def is_monitored() -> bool:
    """True when ``ft_launcher`` started this process."""
    return MONITOR_VARIABLE in os.environ


class HeartbeatCallback(Callback):
    """One heartbeat a step. ``ft_launcher`` ends and restarts ranks that owe it one for too long.

    Raises:
        ConfigError: the launcher waits for heartbeats and the package is not installed here.
    """

    name = "heartbeat"

    def __init__(self) -> None:
        try:
            from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
        except ImportError as error:
            raise ConfigError(
                f"{MONITOR_VARIABLE} is set, so ft_launcher waits for heartbeats, but nvidia-resiliency-ext cannot be "
                f"imported ({error}); install it, or start with torchrun"
            ) from error
        self._client: Any = RankMonitorClient()

    def on_train_begin(self, trainer: Trainer) -> None:
        self._client.init_workload_monitoring()

    def on_step_begin(self, trainer: Trainer) -> None:
        self._client.send_heartbeat()

    def close(self) -> None:
        self._client.shutdown_workload_monitoring()
