"""Devices by name: what their vendors publish. Nothing here was measured by us."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llada_mega.config.checks import one_of, require
from llada_mega.planning.options import HardwareOptions
from llada_mega.training.peak import PEAK_TFLOPS


@dataclass(frozen=True)
class Device:
    """One accelerator and what joins it to others.

    Attributes:
        name: for people.
        memory_gib: device memory.
        peak_tflops: dense matrix products by dtype.
        memory_gb_per_s: bandwidth of its memory.
        link_gb_per_s: one direction to the other devices of a node, all links together.
        network_gb_per_s: one direction out of the node, the device's share.
        node_size: devices that the fast links join.
        host_size: devices of one host, whose memory their processes share.
        implementation: of the layers that ``model.implementation=auto`` means on it.
    """

    name: str
    memory_gib: float
    peak_tflops: dict[str, float]
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    node_size: int
    host_size: int
    implementation: str = "te"


def _peak(name: str, fp8: float) -> dict[str, float]:
    return PEAK_TFLOPS[name] | {"fp8": fp8}


# NVIDIA's data sheets of H100 SXM, H200 SXM, HGX B200 and GB200 NVL72, halved where they count sparsity, NVLink both
# ways; one 400 Gb/s adapter a device. Memory in GiB is what remains of the 80, 141, 180 and 186 GB to programs. NVLink
# joins the 72 devices of an NVL72; each of its trays is a host of 4.
DEVICES = {
    "h100": Device("H100 SXM", 79, _peak("H100", 1979), 3350, 450, 50, 8, 8),
    "h200": Device("H200 SXM", 139, _peak("H200", 1979), 4800, 450, 50, 8, 8),
    "b200": Device("B200 SXM", 179, _peak("B200", 4500), 8000, 900, 50, 8, 8),
    "gb200": Device("GB200 NVL72", 184, _peak("GB200", 5000), 8000, 900, 50, 72, 4),
}


def choose_device(options: HardwareOptions, dtype: str) -> Device:
    """The device of the table with the changes of ``options``.

    Raises:
        ConfigError: no such device, or a value that is not positive.
    """
    one_of("hardware.device", options.device, list(DEVICES))
    device = DEVICES[options.device]
    changes = {name: value for name, value in dataclasses.asdict(options).items() if name != "device"}
    for name, value in changes.items():
        require(value is None or value > 0, f"hardware.{name}={value} must be positive")
    peak = changes.pop("peak_tflops")
    given = {name: value for name, value in changes.items() if value is not None}
    if peak is not None:
        factor = peak / device.peak_tflops[dtype]  # FP8 keeps its advantage
        given["peak_tflops"] = {name: value * factor for name, value in device.peak_tflops.items()}
    return dataclasses.replace(device, **given)
