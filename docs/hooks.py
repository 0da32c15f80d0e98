"""What MkDocs does to the pages of this directory, which are also read in the repository itself."""

from __future__ import annotations

import posixpath
import re
from typing import Any

# [text](target) outside of images; targets with a scheme or an anchor alone are left.
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links that leave ``docs/`` become plain text: the site holds no sources (tests/test_docs.py checks them)."""
    directory = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match[str]) -> str:
        inside = not posixpath.normpath(posixpath.join(directory, link[2])).startswith("../")
        return link[0] if inside else link[1]

    return _LINK.sub(replace, markdown)
