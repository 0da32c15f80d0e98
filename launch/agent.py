"""torchrun, for ranks that may be asked to stop: their status 85 is no failure, and comes through.

Takes torchrun's arguments. Everything else that a rank ends with makes this end with 1, after torchrun's own report of
the first failure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llada_mega.ranks import STOPPED_STATUS


def main(arguments: Sequence[str]) -> int:
    """0, ``STOPPED_STATUS`` when every rank of this node that ended otherwise ended with it, or 1."""
    try:
        run.run(run.parse_args(list(arguments)))
    except ChildFailedError as error:
        if {failure.exitcode for failure in error.failures.values()} == {STOPPED_STATUS}:
            return STOPPED_STATUS
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
