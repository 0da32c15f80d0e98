"""Read a report the way a browser does, strictly."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "img", "link", "hr", "input"}


@dataclass(eq=False)
class Page(HTMLParser):
    """Tags with their attributes, visible text, ids; ``problems`` names tags that do not nest."""

    html: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.html)
        self.close()
        self.problems += [f"unclosed {tag}" for tag in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.stack:
            self.texts.append((self.stack[-1] if self.stack else "", data.strip()))

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(text for _, text in self.texts))

    def inside(self, tag: str) -> list[str]:
        """Texts directly inside elements of this tag."""
        return [text for parent, text in self.texts if parent == tag]

    def with_class(self, name: str) -> int:
        return sum(name in attributes.get("class", "").split() for _, attributes in self.tags)

    @property
    def titles(self) -> list[str]:
        return self.inside("h3")

    def external_references(self) -> list[str]:
        """Everything a browser would fetch or run."""
        found = [tag for tag, _ in self.tags if tag in {"script", "link", "img", "iframe", "object", "embed", "image"}]
        for _, attributes in self.tags:
            found += [f"{name}={value}" for name, value in attributes.items()
                      if (name in {"src", "srcset", "href", "xlink:href", "data"} and not value.startswith("#"))
                      or name.startswith("on")]  # fmt: skip
        found += re.findall(r"url\((?!#)[^)]*\)|@import|https?://\S+", self.html)
        return found

    def id_problems(self) -> list[str]:
        """Ids given twice, references to ids that are not there."""
        ids = Counter(attributes["id"] for _, attributes in self.tags if "id" in attributes)
        referenced = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', self.html))
        missing = {first or second for first, second in referenced} - set(ids)
        return [f"twice: {name}" for name, number in ids.items() if number > 1] + [
            f"missing: {name}" for name in missing
        ]


def read_page(path: Path) -> Page:
    """Parse and check what holds for every report: it nests, fetches nothing, and its ids are sound."""
    page = Page(path.read_text(encoding="utf-8"))
    assert page.problems == []
    assert page.external_references() == []
    assert page.id_problems() == []
    return page
