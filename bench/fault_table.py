"""What a campaign of faults came to, as a table."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

DESCRIPTION = {
    "kill_rank_0": "`kill -9` of the first rank at a random moment",
    "kill_rank_1": "`kill -9` of the second rank at a random moment",
    "kill_saving": "`kill -9` of a rank up to 0.15 s after a save began",
    "kill_launcher": "`kill -9` of the launcher at a random moment",
    "full_disk": "the disk is filled to 64 KiB",
    "corrupt_newest": "killed; a file of the newest checkpoint changed, cut or removed",
    "missing_shard": "killed; the data shard cannot be opened",
    "cut_shard": "the data shard is cut while it is mapped",
    "nan": "NaN in a gradient of one rank",
    "hang": "a rank hangs in its data",
    "hang_after_backward": "a rank hangs after the backward pass",
    "freeze": "a rank is stopped (SIGSTOP)",
    "slow": "a rank is a second late at every step",
}


@dataclass
class Result:
    """One fault: how and how fast it was noticed, and how the run went on."""

    kind: str
    detected_by: str
    detect_seconds: float
    step: int  # of the newest row when it was noticed
    committed: int  # step that the run had to go on from
    resume_seconds: float = 0.0
    resumed_at: int = -1

    @property
    def steps_again(self) -> int:
        """Steps that were made and had to be made again."""
        return self.step - self.committed

    def __str__(self) -> str:
        return (
            f"{self.kind:20} noticed after {self.detect_seconds:5.1f} s, step {self.step}, goes on from "
            f"{self.committed}; {self.detected_by}"
        )


def render(results: Sequence[Result], rows: int, command: str, seconds: float) -> str:
    """The table, with what was run and when."""
    lines = [
        f"{date.today().isoformat()}, `{command}`: {len(results)} faults in {seconds / 60:.0f} minutes. All {rows}",
        "rows that the run wrote, of repeated steps too, equal those of the run left alone; every start went on from",
        "the newest checkpoint that was intact.",
        "",
        "| fault | times | noticed by | seconds to notice, median (most) | seconds to the next step, median (most) | "
        "steps made again, mean (most) |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sorted({result.kind for result in results}, key=list(DESCRIPTION).index):
        own = [result for result in results if result.kind == kind]
        detect, resume = [r.detect_seconds for r in own], [r.resume_seconds for r in own]
        again = [r.steps_again for r in own]
        (words, _), *_ = Counter(_words(r.detected_by) for r in own).most_common()
        lines.append(
            f"| {DESCRIPTION[kind]} | {len(own)} | {words} | {statistics.median(detect):.1f} ({max(detect):.1f}) | "
            f"{statistics.median(resume):.1f} ({max(resume):.1f}) | {statistics.mean(again):.1f} ({max(again)}) |"
        )
    return "\n".join(lines) + "\n"


def _words(detected_by: str) -> str:
    """Without paths and numbers that differ between faults of a kind."""
    text = re.sub(r"/\S*/", "", detected_by).replace("|", "/")
    text = re.sub(r"\b\d+(\.\d+)?\b", "N", text)
    return text[:110]
