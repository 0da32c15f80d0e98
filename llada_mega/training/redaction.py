"""Keep secrets out of everything a run writes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

HIDDEN = "<redacted>"
_SECRET_VARIABLE = re.compile(r"(API_?KEY|TOKEN(?!IZER)|SECRET|PASSWORD|CREDENTIAL)", re.IGNORECASE)
_SECRET_FIELD = re.compile(
    r"""(?P<head>["']?[\w.]*(?:api_?key|secret|password|access_token|auth_token)["']?\s*[:=]\s*)(?P<value>"[^"]*"|[^\s,}]+)""",
    re.IGNORECASE,
)
_MIN_LENGTH = 8  # shorter values ("1", "true") are no secrets and would redact half of a file


@contextlib.contextmanager
def redacted_arguments() -> Iterator[None]:
    """``sys.argv`` without secrets, for libraries that store it."""
    original = sys.argv
    sys.argv = [redact(argument) for argument in original]
    try:
        yield
    finally:
        sys.argv = original


def redact(text: str) -> str:
    """``text`` without the values of secret-looking environment variables and of fields with secret-looking names."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _MIN_LENGTH:
            text = text.replace(value, HIDDEN)
    return _SECRET_FIELD.sub(lambda match: match["head"] + f'"{HIDDEN}"', text)
