"""One small run on two processes through many faults, against the same run left alone.

    python -m bench.faults [--count 65] [--seed 0] [--directory DIR] [--output table.md]

The run is started again after every fault, until all have happened and it has finished. Every row that it ever wrote,
of steps that were made twice too, has to equal the row of the run that was left alone, bit for bit; every start has to
go on from the newest checkpoint that was complete when the fault came, or, where that is what was damaged, from the one
before. Needs a tmpfs to be filled to the brim: root, or user namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.corpus import prepare_corpus
from bench.fault_table import Result, render
from llada_mega.checkpoint.checkpoint import list_checkpoints

EVERY = 5  # steps between checkpoints
HANG_SECONDS = 15
PATIENCE = 300.0  # seconds for anything that has to happen
EXACT = ("loss", "ce_masked", "accuracy", "mask_ratio", "grad_norm", "lr", "consumed_samples", "consumed_tokens")
DISK_MIB = 64


class CampaignError(Exception):
    """The campaign found something wrong."""


@dataclass
class Start:
    """One start of the run: its launcher, what it printed, when it began."""

    process: subprocess.Popen[bytes]
    output: Path
    began: float

    def wait(self) -> int:
        """The launcher's status. Raises CampaignError when it does not end."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise CampaignError(f"the launcher did not end:\n{self.text()}") from None

    def text(self) -> str:
        """All that it has printed."""
        return self.output.read_text(errors="replace")


@dataclass
class Campaign:
    """The run under ``directory``, which is a file system of its own."""

    directory: Path
    shard: Path  # prefix of the corpus
    overrides: list[str]
    random: random.Random
    results: list[Result] = field(default_factory=list)
    newest: Start | None = None

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def start(self, fault: dict[str, Any] | None = None, *extra: str) -> Start:
        """Start the launcher; a planted fault belongs to it."""
        output = self.directory.parent / f"start_{len(list(self.directory.parent.glob('start_*'))):03d}.log"
        arguments = [*self.overrides, f"checkpoint.async={self.random.random() < 0.5}", *extra]
        command = [sys.executable, "-m", "bench.fault_worker", "train", f"run.dir={self.run_dir}", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"FAULT": json.dumps(fault)} if fault else {})
        with output.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        self.newest = Start(process, output, time.time())
        return self.newest

    def close(self) -> None:
        """Leave no process behind."""
        if self.newest is None or self.newest.process.poll() is not None:
            return
        for process in [*psutil.Process(self.newest.process.pid).children(recursive=True), self.newest.process]:
            process.kill()

    def rows(self) -> list[dict[str, Any]]:
        """All rows with a loss, in the order in which they were written; a torn last line does not count."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [row for row in rows if "loss" in row]

    def committed(self) -> int:
        """Step of the newest complete checkpoint."""
        complete = list_checkpoints(self.run_dir / "checkpoints")
        return int(complete[-1].name.removeprefix("step_")) if complete else 0

    def wait_for(self, condition: Callable[[], bool], start: Start, what: str) -> None:
        """Until ``condition``. Raises CampaignError after PATIENCE seconds, or when the launcher ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if start.process.poll() is not None or time.monotonic() > deadline:
                raise CampaignError(f"waited in vain for {what}:\n{start.text()}")
            time.sleep(0.02)

    # ---- one fault ---------------------------------------------------------------------------------------------------

    def inject(self, kind: str) -> None:
        """Start the run, let the fault happen, see how it is noticed; the next start is the resume from it."""
        before = len(self.rows())
        planned = PLANNED.get(kind)
        first = self.committed()
        target = max(first + self.random.randint(2, 2 * EVERY), 2 * EVERY + 1)  # two checkpoints at least
        note = self.directory.parent / "note"
        note.unlink(missing_ok=True)
        fault: dict[str, Any] | None = None
        if planned is not None:
            rank = self.random.randrange(2)
            if kind == "kill_saving":
                target += -target % EVERY
            fault = {"kind": kind, "step": target, "rank": rank, "note": str(note)} | planned(self.random)
        start = self.start(fault)
        self.finish_previous(start, before)
        if fault is not None:
            self.wait_for(note.exists, start, f"the fault {kind}") if kind != "slow" else None
        else:
            self.wait_for(lambda: self.step() >= target, start, f"step {target}")
            time.sleep(self.random.uniform(0, 0.5))
        outside = OUTSIDE.get(kind)
        happened = time.time()
        if outside is not None:
            outside(self, start)
        detected = self.how_detected(kind, start, note)
        noticed = time.time()
        if fault is not None:
            happened = float(note.read_text())
        step = self.step()
        committed = self.committed()
        after = AFTER.get(kind)
        if after is not None:
            committed = after(self, committed)
        self.results.append(Result(kind, detected, noticed - happened, step, committed))

    def how_detected(self, kind: str, start: Start, note: Path) -> str:
        """Wait until the fault is noticed, and say by what."""
        if kind == "slow":
            self.wait_for(lambda: "slow: rank" in start.text().replace("\n", " "), start, "the warning")
            found = "warning: " + line_with(start.text(), "slow: rank")
            start.process.send_signal(signal.SIGUSR1)
            if (status := start.wait()) != 85:
                raise CampaignError(f"status {status} after SIGUSR1:\n{start.text()}")
            return found
        status = start.wait()
        if status == 0:
            raise CampaignError(f"{kind} was not noticed:\n{start.text()}")
        if status > 0:
            return line_with(start.text(), "error")  # the launcher's conclusion comes last
        self.wait_for_ranks()
        return "its ranks: " + json.loads((self.run_dir / "exit.json").read_text())["reason"]

    def wait_for_ranks(self) -> None:
        """Until no rank holds the run's lock."""
        deadline = time.monotonic() + PATIENCE
        with (self.run_dir / "lock").open() as file:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(0.05)
        raise CampaignError("ranks without a launcher did not end")

    def step(self) -> int:
        """Step of the newest row."""
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def finish_previous(self, start: Start, before: int) -> None:
        """The first new row ends the resume from the fault before this start."""
        self.wait_for(lambda: len(self.rows()) > before, start, "the first step after the start")
        if self.results:
            result = self.results[-1]
            result.resume_seconds = time.time() - start.began
            result.resumed_at = self.rows()[before]["step"] - 1
            if result.resumed_at != result.committed:
                raise CampaignError(f"{result.kind}: resumed at {result.resumed_at}, committed were {result.committed}")

    def check_rows(self, reference: dict[int, dict[str, Any]]) -> int:
        """Compare every row with the run that was left alone; the number of rows."""
        rows = self.rows()
        for row in rows:
            other = reference[row["step"]]
            wrong = {key: (row[key], other[key]) for key in EXACT if row[key] != other[key]}
            if wrong:
                raise CampaignError(f"step {row['step']} differs: {wrong}")
        if {row["step"] for row in rows} != set(reference):
            raise CampaignError("steps are missing")
        return len(rows)


# ---- the faults ------------------------------------------------------------------------------------------------------

# Planted in a rank: the kind, and what it needs beside step and rank.
PLANNED: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "nan": lambda r: {},
    "hang": lambda r: {},
    "hang_after_backward": lambda r: {},
    "freeze": lambda r: {},
    "slow": lambda r: {"steps": 1000, "seconds": 1.0},
    "kill_saving": lambda r: {"seconds": r.uniform(0.0, 0.15)},
}


def ranks_of(start: Start) -> list[int]:
    """Process ids of the ranks, first rank first."""
    listed = subprocess.run(["pgrep", "-P", str(start.process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, listed.stdout.split()))


def kill_rank(rank: int) -> Callable[[Campaign, Start], None]:
    return lambda campaign, start: os.kill(ranks_of(start)[rank], signal.SIGKILL)


def kill_launcher(campaign: Campaign, start: Start) -> None:
    os.kill(start.process.pid, signal.SIGKILL)


def fill_disk(campaign: Campaign, start: Start) -> None:
    free = shutil.disk_usage(campaign.directory).free
    with (campaign.directory / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - 2**16, 1))


def empty_disk(campaign: Campaign, committed: int) -> int:
    (campaign.directory / "ballast").unlink()
    return committed


def corrupt_newest(campaign: Campaign, committed: int) -> int:
    """Flip a bit, cut a file short or remove it; returns the step before, which the run has to fall back to."""
    complete = list_checkpoints(campaign.run_dir / "checkpoints")
    newest = complete[-1]
    path = campaign.random.choice([path for path in sorted(newest.rglob("*")) if path.is_file()])
    how = campaign.random.choice(("flip", "cut", "remove"))
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[campaign.random.randrange(len(content))] ^= 1 << campaign.random.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        os.truncate(path, len(content) // 2)
    else:
        path.unlink()
    return int(complete[-2].name.removeprefix("step_"))


def hide_shard(campaign: Campaign, committed: int) -> int:
    """The shard is gone at the next start, which has to refuse in one line; then it is there again."""
    shard = campaign.shard.with_suffix(".bin")
    hidden = shard.rename(shard.with_suffix(".hidden"))
    start = campaign.start()
    if start.wait() != 2 or "Traceback" in start.text() or str(shard) not in start.text():
        raise CampaignError(f"an unreadable shard was not refused in one line:\n{start.text()}")
    hidden.rename(shard)
    return committed


def cut_shard(campaign: Campaign, start: Start) -> None:
    """Shorten the file under the ranks that have it mapped: reading beyond its end is a bus error."""
    shard = campaign.shard.with_suffix(".bin")
    shutil.copyfile(shard, shard.with_suffix(".saved"))
    os.truncate(shard, 0)


def mend_shard(campaign: Campaign, committed: int) -> int:
    shard = campaign.shard.with_suffix(".bin")
    start = campaign.start()  # as long as it is cut nothing starts
    if start.wait() != 2 or "Traceback" in start.text():
        raise CampaignError(f"a shortened shard was not refused in one line:\n{start.text()}")
    shard.with_suffix(".saved").replace(shard)
    return committed


# Done to the run from outside, at a random moment.
OUTSIDE: dict[str, Callable[[Campaign, Start], None]] = {
    "kill_rank_0": kill_rank(0),
    "kill_rank_1": kill_rank(1),
    "kill_launcher": kill_launcher,
    "full_disk": fill_disk,
    "corrupt_newest": kill_rank(1),
    "missing_shard": kill_rank(0),
    "cut_shard": cut_shard,
}
# What follows before the run is started again; returns the step that it has to go on from.
AFTER: dict[str, Callable[[Campaign, int], int]] = {
    "full_disk": empty_disk,
    "corrupt_newest": corrupt_newest,
    "missing_shard": hide_shard,
    "cut_shard": mend_shard,
}
KINDS = (*OUTSIDE, *PLANNED)


def line_with(text: str, word: str) -> str:
    """The last line that has ``word``, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return next((line for line in reversed(lines) if word in line), lines[-1])


# ---- the campaign ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mount a tmpfs of DISK_MIB on ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def run_campaign(
    directory: Path, kinds: Sequence[str], seed: int, say: Callable[[str], None]
) -> tuple[list[Result], int]:
    """Every kind in ``kinds`` once, in a random order; the results, and the number of rows that were compared.

    Raises:
        CampaignError: a fault was not noticed, a committed step was lost, or a number differs.
    """
    order = random.Random(seed)
    shuffled = order.sample(kinds, len(kinds))
    corpus = prepare_corpus(directory / "corpus")
    overrides = [
        *corpus,
        "data.sequence_length=64",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2",
        "optimizer.lr=1e-3",
        "curriculum.stages=[{name: small, block_size: 4, tokens: 40960, embedding_noise: {decay_tokens: 20480}},"
        "{name: whole, block_size: 64, tokens: 40960}, {name: eight, block_size: 8, tokens: 4096000}]",
        "parallel.distributed_optimizer=true",
        f"checkpoint.every={EVERY}",
        "checkpoint.keep_last=3",
        f"trainer.hang_minutes={HANG_SECONDS / 60}",
        "logging.progress=false",
    ]
    campaign = Campaign(directory / "disk", directory / "corpus" / "prose", overrides, order)
    with small_disk(directory / "disk"), contextlib.closing(campaign):
        for number, kind in enumerate(shuffled, 1):
            campaign.inject(kind)
            say(f"{number:3d}/{len(shuffled)} {campaign.results[-1]}")
        last = campaign.committed() + 2 * EVERY
        before = len(campaign.rows())
        last = max(last, max(row["step"] for row in campaign.rows()))
        start = campaign.start(None, f"trainer.max_steps={last}")
        campaign.finish_previous(start, before)
        if start.wait() != 0:
            raise CampaignError(f"the run did not finish:\n{start.text()}")
        say(f"the run left alone: {last} steps")
        alone = Campaign(directory / "disk" / "alone", campaign.shard, overrides, order)
        alone.directory.mkdir()
        if (start := alone.start(None, f"trainer.max_steps={last}")).wait() != 0:
            raise CampaignError(f"the run left alone did not finish:\n{start.text()}")
        return campaign.results, campaign.check_rows({row["step"]: row for row in alone.rows()})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=65)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--output", type=Path, help="write the table there, too")
    given = parser.parse_args()
    if os.geteuid():  # mounting needs a namespace of our own
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "bench.faults", *sys.argv[1:]])
    kinds = [given.kinds[index % len(given.kinds)] for index in range(given.count)]
    directory = given.directory or Path(tempfile.mkdtemp(prefix="llada_mega_faults_"))
    began = time.time()
    try:
        results, rows = run_campaign(directory, kinds, given.seed, lambda line: print(line, flush=True))
    except CampaignError as error:
        sys.exit(f"error: {error}\nwhat the launchers printed is in {directory}")
    if given.directory is None:
        shutil.rmtree(directory)
    command = f"make faults ARGS='--count {given.count} --seed {given.seed}'"
    table = render(results, rows, command, time.time() - began)
    print(table)
    if given.output:
        given.output.write_text(table)


if __name__ == "__main__":
    main()
