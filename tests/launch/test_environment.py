"""The variables of every preset, as they are rendered: a change must be meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.environment import FABRICS, Job, choose_fabric, device_connections, environment
from launch.hardware import Hardware, cloud, rdma_devices

GOLDEN = Path(__file__).parent / "golden"
HOPPER = Hardware(gpu_architecture=9, gpus=8, cpus=96)
JOB = Job(nodes=4, processes=8, tensor_parallel=True, overlap=True, log_dir=Path("/runs/a/logs"))
NODES = {
    "single_node": HOPPER,
    # Two ports of storage and one that is down beside the compute fabric: the presets name the right ones.
    "infiniband": replace(HOPPER, rdma={"mlx5_0": "InfiniBand", "mlx5_1": "InfiniBand", "mlx5_2": "Ethernet"}),
    "roce": replace(HOPPER, gpu_architecture=10, rdma={"mlx5_0": "Ethernet", "mlx5_1": "Ethernet"}),
    "efa": replace(HOPPER, rdma={"rdmap0": ""}, cloud="aws"),
    "gcp": replace(HOPPER, gpu_architecture=10, rdma={"mlx5_0": "Ethernet"}, cloud="gcp"),
    "ethernet": HOPPER,
    "cpu": Hardware(cpus=16),
}


def render(name: str) -> str:
    fabric = "ethernet" if name == "cpu" else name
    return "".join(f"{key}={value}\n" for key, value in environment(fabric, NODES[name], JOB, {}).items())


@pytest.mark.parametrize("name", NODES)
def test_rendered_presets(name: str) -> None:
    assert render(name) == (GOLDEN / f"{name}.env").read_text()


def test_every_fabric_has_a_golden_file() -> None:
    assert {path.stem for path in GOLDEN.glob("*.env")} == {*FABRICS, "cpu"} == set(NODES)


@pytest.mark.parametrize("name", [name for name in NODES if name != "cpu"])
def test_auto_finds_the_fabric(name: str) -> None:
    nodes = 1 if name == "single_node" else 4
    assert choose_fabric(NODES[name], nodes) == name
    assert environment("auto", NODES[name], replace(JOB, nodes=nodes), {})["FABRIC"] == name


def test_what_the_user_has_set_stays() -> None:
    added = environment("roce", NODES["roce"], JOB, {"NCCL_IB_TC": "41", "OMP_NUM_THREADS": "3"})
    assert not added.keys() & {"NCCL_IB_TC", "OMP_NUM_THREADS"}
    assert added["NCCL_NET"] == "IB"


def test_an_unknown_fabric_is_refused() -> None:
    with pytest.raises(ValueError, match="FABRIC=token_ring is unknown; use auto, single_node"):
        environment("token_ring", HOPPER, JOB, {})


@pytest.mark.parametrize(
    ("architecture", "tensor_parallel", "overlap", "connections"),
    [
        (9, True, True, "1"),
        (9, True, False, "1"),
        (9, False, True, "32"),
        (9, False, False, None),
        (10, True, True, "32"),
    ],
)
def test_device_connections(architecture: int, tensor_parallel: bool, overlap: bool, connections: str | None) -> None:
    assert device_connections(architecture, tensor_parallel, overlap) == connections


def write_device(root: Path, name: str, layer: str, state: str = "4: ACTIVE", vendor: str = "0x15b3") -> None:
    port = root / "class/infiniband" / name / "ports/1"
    port.mkdir(parents=True)
    (port / "link_layer").write_text(layer + "\n")
    (port / "state").write_text(state + "\n")
    (port.parents[1] / "device").mkdir()
    (port.parents[1] / "device/vendor").write_text(vendor + "\n")


def test_devices_are_read_from_sysfs(tmp_path: Path) -> None:
    assert (rdma_devices(tmp_path), cloud(tmp_path)) == ({}, "")
    write_device(tmp_path, "mlx5_10", "InfiniBand")
    write_device(tmp_path, "mlx5_2", "Ethernet")
    write_device(tmp_path, "mlx5_3", "InfiniBand", state="1: DOWN")
    assert list(rdma_devices(tmp_path).items()) == [("mlx5_2", "Ethernet"), ("mlx5_10", "InfiniBand")]
    assert cloud(tmp_path) == ""
    product = tmp_path / "class/dmi/id/product_name"
    product.parent.mkdir(parents=True)
    product.write_text("Google Compute Engine\n")
    assert cloud(tmp_path) == "gcp"
    write_device(tmp_path, "rdmap0s6", "Unspecified", vendor="0x1d0f")
    assert cloud(tmp_path) == "aws"
