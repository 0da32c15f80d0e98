"""``python -m llada_mega``: the same as the ``llada-mega`` command."""

import sys

from llada_mega.cli import main

if __name__ == "__main__":
    sys.exit(main())
