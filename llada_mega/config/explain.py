"""Turns what Hydra and OmegaConf raise into one line that names the key, the value and a fix."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from llada_mega.config.reference import (
    element_type,
    fields_of,
    find,
    is_optional,
    nearest,
    section_path,
    type_name,
    without_optional,
)
from llada_mega.errors import ConfigError


def unknown_key(schema: type, path: str, groups: Sequence[str] = (), where: str = "") -> ConfigError:
    """``path`` is no key of ``schema``; ``where`` names the file it stands in."""
    guess = nearest(schema, path, groups)
    if guess:
        return ConfigError(f"{path} is not a key{where}; did you mean {guess}?")
    parent = path.rpartition(".")[0]
    section = without_optional(find(schema, parent)) if parent else schema
    if not dataclasses.is_dataclass(section):
        parent, section = "", schema
    names = ", ".join(key.path for key in fields_of(section))
    return ConfigError(f"{path} is not a key{where}; {parent or 'there'} has {names}".replace("there has", "there are"))


def explain(error: BaseException, schema: type, groups: Sequence[str]) -> ConfigError:
    """The user's version of an exception that composing a configuration of type ``schema`` raised."""
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, MissingConfigException):
            return _missing_choice(cause)
        if isinstance(cause, OverrideParseException):
            return ConfigError(
                f"cannot read {cause.override!r}: expected key=value, with quotes around special characters"
            )
        if isinstance(cause, MarkedYAMLError):
            mark = cause.problem_mark or cause.context_mark
            place = f"{mark.name} line {mark.line + 1}" if mark else "a configuration file"
            return ConfigError(f"{place} is not valid YAML: {cause.problem or cause.context}")
    where = _file(str(error))
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return _explain_node(cause, schema, groups, where)
    text = " ".join(str(error).split())
    ambiguous = re.match(r"Ambiguous value for argument '(.*?)' 1\.", text)
    if ambiguous:
        key, _, values = ambiguous[1].partition("=")
        return ConfigError(f"{ambiguous[1]} is a sweep; add --multirun, or write a list as {key}=[{values}]")
    return ConfigError(text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _file(text: str) -> str:
    match = re.match(r"In '(.*?)':", text)
    return f" (in configs/{match[1]}.yaml)" if match else ""


def _explain_node(error: OmegaConfBaseException, schema: type, groups: Sequence[str], where: str) -> ConfigError:
    path = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key))
    if find(schema, path.rpartition(".")[0] or path) is None and isinstance(error.object_type, type):
        # OmegaConf forgets the way to an element of a list: its type tells.
        path = section_path(schema, error.object_type) + path
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return unknown_key(schema, path, groups, where)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{path} has no value{where}; set {path}=...")
    hint = find(schema, path.replace("[]", ".0"))
    if isinstance(error, ValidationError) and hint is not None:
        if error.value == {}:  # OmegaConf would have to make a new element to hold the key
            return ConfigError(f"{path} is past the end of its list{where}; write the list as a whole")
        value = "null" if error.value is None else repr(error.value) if isinstance(error.value, str) else error.value
        if element_type(hint) is not None and isinstance(error.value, str):
            return ConfigError(f"{path}={value}{where} must be a {type_name(hint)}; write it as {path}=[...]")
        if error.value is None and not is_optional(hint):
            return ConfigError(f"{path}=null{where} is not allowed; expected {type_name(hint)}")
        return ConfigError(f"{path}={value}{where} has the wrong type; expected {type_name(hint)}")
    return ConfigError(f"{path}{where}: {' '.join(str(error).splitlines()[0].split())}")


def _missing_choice(error: MissingConfigException) -> ConfigError:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or ())
    if not group or not options:
        return ConfigError(" ".join(str(error).splitlines()[0].split()))
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    return ConfigError(f"{group}={name} is not a choice; {hint}: {', '.join(options)}")
