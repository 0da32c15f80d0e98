"""What keys a typed configuration has: names, types, defaults and the comments beside them.

The dataclasses are the only description of the configuration; ``--help``, the error messages and
``docs/configuration.md`` all read it from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """One key of a configuration: ``path`` is dotted, with ``[]`` for "any element of this list"."""

    path: str
    type: Any
    default: Any
    comment: str

    @property
    def is_section(self) -> bool:
        """True when the key holds further keys rather than a value."""
        return dataclasses.is_dataclass(without_optional(self.type))


def without_optional(hint: Any) -> Any:
    """``X`` of ``Optional[X]``; any other type unchanged."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return members[0] if len(members) == 1 else hint
    return hint


def is_optional(hint: Any) -> bool:
    """True when the type admits null."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def element_type(hint: Any) -> Any | None:
    """``X`` of ``list[X]`` (or of an optional one); None for anything else."""
    hint = without_optional(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else None


def type_name(hint: Any) -> str:
    """The type in words that a user of YAML knows."""
    if is_optional(hint):
        return f"{type_name(without_optional(hint))} or null"
    element = element_type(hint)
    if element is not None:
        return f"list of {type_name(element)}"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return {int: "integer", float: "number", bool: "true or false", str: "text", Any: "text or list"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


@functools.cache
def _comments(schema: type) -> dict[str, str]:
    """The trailing comment of each field; empty where the sources are not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(schema))
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, flags=re.MULTILINE))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def fields_of(schema: type) -> list[Key]:
    """The keys directly below ``schema``."""
    return [
        Key(field.name, _hints(schema)[field.name], _default(field), _comments(schema).get(field.name, ""))
        for field in dataclasses.fields(schema)
    ]


def walk(schema: type, prefix: str = "") -> Iterator[Key]:
    """All keys at any depth, each section before what it holds."""
    for key in fields_of(schema):
        path = prefix + key.path
        yield Key(path, key.type, key.default, key.comment)
        inner, separator = without_optional(key.type), "."
        if element_type(inner) is not None:
            inner, separator = element_type(inner), "[]."
        if dataclasses.is_dataclass(inner):
            yield from walk(typing.cast(type, inner), path + separator)


def find(schema: type, path: str) -> Any | None:
    """The type at a dotted ``path`` (``curriculum.stages.0.tokens`` too); None when there is no such key."""
    hint: Any = schema
    for part in path.split("."):
        inner, element = without_optional(hint), element_type(hint)
        if element is not None and part.isdigit():
            hint = element
        elif dataclasses.is_dataclass(inner) and part in _hints(typing.cast(type, inner)):
            hint = _hints(typing.cast(type, inner))[part]
        else:
            return None
    return hint


def optional_section(schema: type, path: str) -> str | None:
    """The first part of ``path`` that is a section which may be null; None when there is none."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        hint = find(schema, ".".join(parts[:end]))
        if hint is not None and is_optional(hint) and dataclasses.is_dataclass(without_optional(hint)):
            return ".".join(parts[:end])
    return None


def section_path(schema: type, section: type) -> str:
    """Where the dataclass ``section`` stands in ``schema``: ``curriculum.stages[].`` or the empty string."""
    for key in walk(schema):
        if without_optional(key.type) is section:
            return key.path + "."
        if element_type(key.type) is section:
            return key.path + "[]."
    return ""


def nearest(schema: type, path: str, groups: typing.Sequence[str] = ()) -> str | None:
    """The key that ``path`` most likely meant; keys of the same last name come first."""
    plain = re.sub(r"\.\d+(?=\.|$)|\[\d*\]", "[]", path)
    parent, _, leaf = plain.rpartition(".")
    known = [key.path for key in walk(schema)] + list(groups)
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    leaves = {name.rpartition(".")[2]: name for name in known}
    namesakes = [name for name in known if name.rpartition(".")[2] == leaf]
    if close := difflib.get_close_matches(leaf, list(siblings), n=1):
        return siblings[close[0]]
    if matches := difflib.get_close_matches(plain, namesakes, n=1, cutoff=0.0):
        return matches[0]
    if close := difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75):
        return leaves[close[0]]
    return None
