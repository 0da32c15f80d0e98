"""Composes typed configurations with Hydra: config groups, overrides, sweeps.

Every command goes through here, ``train`` with the groups of ``configs/``, the others with their options dataclass
alone, so that all speak the same override grammar and make the same error messages. Hydra writes nothing: no
directory, no log file, no change of the working directory.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llada_mega.config.explain import explain, unknown_key
from llada_mega.config.reference import element_type, find, nearest, optional_section, without_optional
from llada_mega.config.schema import Config
from llada_mega.errors import ConfigError

T = TypeVar("T")

# ``async`` is a Python keyword, so the field cannot have the name that users type.
ALIASES = {"checkpoint.async": "checkpoint.async_save"}


def config_directory() -> Path:
    """The directory of the config groups: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise ConfigError(f"no configs directory beside {package}; reinstall llada-mega")


def config_groups() -> dict[str, list[str]]:
    """Name of each config group of ``train``, with its choices."""
    root = config_directory()
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(root.iterdir())
        if folder.is_dir() and any(folder.glob("*.yaml"))
    }


def compose(schema: type[T], overrides: Sequence[str] = ()) -> T:
    """The configuration as dataclasses, defaults and ``overrides`` applied, interpolations resolved.

    ``schema`` is ``Config`` (composed from ``configs/train.yaml``), a subclass, or the options dataclass of a command.
    Raises ConfigError for an unknown key or choice, a wrong type, or an override that cannot be read.
    """
    with _explained(schema):
        return cast(T, OmegaConf.to_object(_compose(schema, overrides)))


def compose_yaml(schema: type, overrides: Sequence[str] = ()) -> str:
    """The composed configuration as YAML, interpolations left as they are written (``--cfg job``)."""
    with _explained(schema):
        return OmegaConf.to_yaml(_compose(schema, overrides))


def expand_sweep(schema: type, overrides: Sequence[str]) -> list[list[str]]:
    """The override lists of all jobs of a multirun: the cartesian product of every choice, range and glob in order."""
    with _explained(schema), _hydra(schema):
        config_loader = GlobalHydra.instance().config_loader()
        choices: dict[str, list[str]] = {}  # a later override of the same key replaces the earlier one
        parser = OverridesParser.create(config_loader=config_loader)
        for override in _parse(schema, overrides, parser, sweep=True):
            key = override.get_key_element()
            if override.is_sweep_override():
                if not override.is_discrete_sweep():
                    raise ConfigError(f"{override.input_line} is no list of values; use {key}=a,b or range or choice")
                choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                choices[key] = [f"{key}={override.get_value_element_as_str()}"]
    return [list(job) for job in itertools.product(*choices.values())]


def is_swept(job_overrides: Sequence[Sequence[str]], key: str) -> bool:
    """True when the jobs of a multirun differ in ``key``."""
    values = {tuple(o for o in job if o.startswith(f"{key}=")) for job in job_overrides}
    return len(values) > 1


def _is_run(schema: type) -> bool:
    """True for the configuration of a run, also where a command adds keys of its own."""
    return issubclass(schema, Config)


def _config_name(schema: type) -> str:
    return "train" if _is_run(schema) else f"options_{schema.__module__}.{schema.__qualname__}"


def _groups(schema: type) -> list[str]:
    return list(config_groups()) if _is_run(schema) else []


def _compose(schema: type, overrides: Sequence[str]) -> DictConfig:
    with _hydra(schema):
        parsed = _parse(schema, overrides, OverridesParser.create())
        try:
            return hydra_compose(_config_name(schema), [str(override.input_line) for override in parsed])
        except (AssertionError, AttributeError) as error:  # OmegaConf cannot fill an optional section that is null
            for override in parsed:
                section = optional_section(schema, override.key_or_group)
                if section is not None:
                    raise ConfigError(
                        f"{override.input_line}: {section} is null and cannot be filled in from here; "
                        "set it in a configuration file, or give the whole list"
                    ) from error
            raise


@contextmanager
def _hydra(schema: type) -> Iterator[None]:
    store = ConfigStore.instance()
    store.store(name="train_schema" if _is_run(schema) else _config_name(schema), node=schema, provider="llada_mega")
    Plugins.instance()
    # The options of the other commands see no config groups: `eval checkpoint=...` names a path, not a group's choice.
    directory = str(config_directory()) if _is_run(schema) else None
    with initialize_config_dir(directory, version_base="1.3") if directory else initialize(None, version_base="1.3"):
        yield


@contextmanager
def _explained(schema: type) -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise explain(error, schema, _groups(schema)) from error


def _parse(schema: type, overrides: Sequence[str], parser: OverridesParser, sweep: bool = False) -> list[Override]:
    """Parsed overrides, each checked to name a key: Hydra itself accepts ``+a.b=1`` and forgets it, and ``~a.b``."""
    groups = _groups(schema)
    parsed = []
    for text in overrides:
        override = _parse_one(schema, _without_alias(text), parser, sweep)
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")):
            if key != "hydra.searchpath":
                raise ConfigError(
                    f"{key} has no effect here; a run writes to run.dir, and hydra.searchpath is the only hydra key"
                )
        elif key in groups and not (override.is_sweep_override() or isinstance(override.value(), str)):
            raise ConfigError(
                f"{key}={override.value()} is not a choice; {key} names one of: {', '.join(config_groups()[key])}"
            )
        elif key not in groups and find(schema, key) is None:
            raise unknown_key(schema, key, groups)
        elif override.is_delete():
            raise ConfigError(f"~{key} would remove a key that is needed; give it another value instead")
        parsed.append(override)
    return parsed


def _without_alias(text: str) -> str:
    match = re.match(r"(\+{0,2})([\w.]+)=", text)
    if match and match[2] in ALIASES:
        return f"{match[1]}{ALIASES[match[2]]}={text[match.end() :]}"
    return text


def _parse_one(schema: type, text: str, parser: OverridesParser, sweep: bool) -> Override:
    """Reads one override; values of text keys and single elements of lists need no quotes and no brackets."""
    key, equals, value = text.partition("=")
    if not equals and not key.startswith("~"):
        guess = nearest(schema, key, _groups(schema))
        raise ConfigError(f"cannot read {text!r}: expected key=value" + (f", such as {guess}=..." if guess else ""))
    hint = find(schema, key.lstrip("+"))
    if hint is None or value in ("", "null", "???"):
        return _read(parser, text)
    if sweep:
        try:
            override = _read(parser, text)
            if override.is_sweep_override() or element_type(hint) is None:
                return override
        except OverrideParseException:
            pass
    element = element_type(hint)
    if element is not None and not value.startswith(("[", "${")):
        if dataclasses.is_dataclass(element) and not value.startswith("{"):
            value = f"{{{dataclasses.fields(element)[0].name}: {_quoted(value)}}}"  # data.train=PREFIX
        return _read(parser, f"{key}=[{_quoted(value) if element is str else value}]")
    return _read(parser, f"{key}={_quoted(value)}" if without_optional(hint) is str else text)


def _read(parser: OverridesParser, text: str) -> Override:
    return parser.parse_overrides([text])[0]  # the plural form names the override in its error


def list_override(key: str, values: Sequence[str]) -> str:
    """The override that sets ``key`` to a list of texts."""
    return f"{key}=[{','.join(map(_quoted, values))}]"


def _quoted(value: str) -> str:
    """``value`` as a quoted string of Hydra's grammar, unless it is one already; interpolations stay alive."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"
