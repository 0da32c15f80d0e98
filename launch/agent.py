"""torchrun, for ranks that may be asked to stop: their status 85 is no failure, and comes through.

Takes torchrun's arguments. Everything else that a rank ends with makes this end with 1, after torchrun's own report of
the first failure.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llada_mega.ranks import STOPPED_STATUS


def main(arguments: Sequence[str]) -> int:
    """0; ``STOPPED_STATUS`` when this node's ranks were asked to stop; 1 when one failed; 128 + a signal that came."""
    try:
        # torchrun would make such a directory too, and leave it; ranks keep their logs in the run's directory.
        with tempfile.TemporaryDirectory(prefix="llada_mega_torchrun_") as log_dir:
            run.run(run.parse_args([f"--log-dir={log_dir}", *arguments]))
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        # torchrun ends the ranks that are still there when the first one has ended, which may come a moment later.
        if statuses - {-signal.SIGTERM} == {STOPPED_STATUS}:
            return STOPPED_STATUS
        print(error, file=sys.stderr)
        return 1
    except SignalException as error:  # it has stopped the ranks
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
