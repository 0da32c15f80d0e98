"""How nodes find each other, whoever sets the variables."""

from __future__ import annotations

import pytest

from launch.rendezvous import Rendezvous

PLAIN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Rendezvous()),
        (PLAIN, Rendezvous(2, 1, "127.0.0.1", 4000)),
        (
            {"PET_NNODES": "3", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "job-0", "PET_RDZV_ID": "job"},
            Rendezvous(3, 0, "job-0", 29500, "job"),
        ),
        ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "job-0.svc"}, Rendezvous(2, 1, "job-0.svc")),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_NNODES": "2",
                "SLURM_NODEID": "1",
                "SLURM_JOB_ID": "7",
                "MASTER_ADDR": "10.0.0.1",
            }
            | {"SLURM_RESTART_COUNT": "4"},
            Rendezvous(2, 1, "10.0.0.1", 29500, "7", "4"),
        ),
        ({"SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}, Rendezvous()),  # a shell of salloc
        (
            PLAIN | {"RDZV_BACKEND": "static", "RUN_ID": "mine"},
            Rendezvous(2, 1, "127.0.0.1", 4000, "mine", "0", "static"),
        ),
    ],
    ids=["alone", "ssh", "kubeflow", "indexed job", "slurm", "salloc", "static"],
)
def test_from_environment(variables: dict[str, str], expected: Rendezvous) -> None:
    assert Rendezvous.from_environment(variables) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"NODE_RANK": ""}, "NODE_RANK is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"NODE_RANK": "2"}, "ranks go from 0 to 1"),
        ({"NNODES": "two"}, "NNODES/PET_NNODES=two is no number"),
        ({"RDZV_BACKEND": "etcd"}, "use c10d or static"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rendezvous.from_environment(PLAIN | changed)


def test_torchrun_arguments() -> None:
    assert Rendezvous().torchrun_arguments(purpose="train") == ["--standalone"]
    c10d = Rendezvous.from_environment(PLAIN | {"RUN_ID": "r"})
    assert c10d.torchrun_arguments(purpose="train") == [
        "--nnodes=2",
        "--local-addr=127.0.0.1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:4000",
        "--rdzv-id=r-0-train",
        "--rdzv-conf=is_host=0",
    ]
    static = Rendezvous.from_environment(PLAIN | {"RDZV_BACKEND": "static"})
    assert static.torchrun_arguments(purpose="train") == [
        "--nnodes=2",
        "--local-addr=127.0.0.1",
        "--rdzv-backend=static",
        "--node-rank=1",
        "--master-addr=127.0.0.1",
        "--master-port=4000",
    ]


def test_a_head_that_does_not_resolve() -> None:
    unknown = Rendezvous.from_environment(PLAIN | {"MASTER_ADDR": "nowhere.invalid"})
    with pytest.raises(ValueError, match=r"MASTER_ADDR=nowhere\.invalid cannot be reached"):
        unknown.torchrun_arguments(purpose="train")
