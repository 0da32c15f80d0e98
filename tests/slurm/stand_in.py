"""A launcher that only does what a test asks for, in place of ``launch/torchrun.sh``; needs no torch.

Each task notes what it sees in ``$NOTES/<node>.<restart>``, one line an event. ``PLAN`` has one word a start, the last
one holds for all that follow: a number is the exit status of the first node (the others end well), ``counted`` counts
the start as a launcher does and ends with 137, ``given_up`` gives up on the first node while the other is killed,
``wait`` waits for a signal and ends with 85, ``sleep`` waits for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

node, start = os.environ["SLURM_NODEID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
plan = os.environ["PLAN"].split()
action = plan[min(start, len(plan) - 1)]
notes = Path(os.environ["NOTES"]) / f"{node}.{start}"


def note(text: str) -> None:
    with notes.open("a") as file:
        file.write(text + "\n")


def on_signal(number: int, frame: object) -> None:
    note(signal.Signals(number).name)
    if action == "wait":
        sys.exit(85 if node == "0" else 0)


for sent in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(sent, on_signal)
note(f"pid {os.getpid()}")
note(f"arguments {' '.join(sys.argv[1:])}")
note(f"master {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
if action == "counted":
    action = "137"
    if node == "0":
        Path(os.environ["STARTS_FILE"]).unlink()
if action == "given_up":
    Path(os.environ["VERDICT_FILE"]).write_text("86\n")
    sys.exit(86 if node == "0" else 137)
if action.isdecimal():
    sys.exit(int(action) if node == "0" else 0)
while True:
    time.sleep(0.1)
