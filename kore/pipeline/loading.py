"""Read a run configuration from YAML, with errors that name the key, its place and the nearest right one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kore.errors import ConfigError
from kore.pipeline.config import ExistingDirectory, ExistingFile, RunConfig

Key = tuple[str | int, ...]
Where = Callable[[Key], str]
R = TypeVar("R", bound=BaseModel)
_OF_MODELS: tuple[Key, ...] = (("generator", "model"), ("images", "clip"))
_MODELS = (*_OF_MODELS, *(("augment", *key) for key in _OF_MODELS))
"""Keys of models beside ``model.path``: a directory, a hub id, or a name that a server knows."""


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, check_paths: bool = True) -> RunConfig:
    """Read and check a run configuration.

    Relative paths in the file are taken from the file's folder, those in overrides from the working directory.

    Args:
        path: The YAML file.
        overrides: ``section.key=value`` texts, the value being YAML; a number addresses a list entry.
        check_paths: Also check that every input file and directory exists.

    Raises:
        ConfigError: One line that names the file, the line where there is one, and the key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        values, tree = yaml.safe_load(text), yaml.compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(f"{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as model, old and new, found {type(values).__name__}")
    given = [_apply(values, override) for override in overrides]

    def where(key: Key) -> str:
        if any(key[: len(one)] == one or one[: len(key)] == key for one in given):
            return "command line"
        line = _line(tree, key)
        return f"{path}:{line}" if line else f"{path}"

    config = _validate(RunConfig, values, where)
    return _resolve(config, path.absolute().parent, given, where, check_paths)


def parse_options(root: type[R], values: dict[str, Any], overrides: Sequence[str] = ()) -> R:
    """Check the options of a single command against the sections of ``root``.

    Relative paths are taken from the working directory. Raises ConfigError, one line that names the key.
    """
    for override in overrides:
        _apply(values, override)
    config = _validate(root, values, lambda key: "command line")
    return _resolve(config, Path.cwd(), [], lambda key: "command line", True)


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        keys.append(f"{prefix}{name}")
        if section is not None:
            keys.extend(known_keys(section, f"{prefix}{name}."))
    return keys


def parse_override(text: str) -> tuple[Key, Any]:
    """Split ``a.b=value``; the value is read as YAML. Raises ConfigError."""
    name, equals, value = text.partition("=")
    if not equals or not name or any(not part for part in name.split(".")):
        raise ConfigError(f"{text!r}: expected an override of the form section.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{text!r}: the value is not valid YAML") from None
    return tuple(int(part) if part.isdigit() else part for part in name.split(".")), parsed


def _apply(values: dict[str, Any], override: str) -> Key:
    key, value = parse_override(override)
    node: Any = values
    for part, following in zip(key, [*key[1:], None]):
        if isinstance(node, list):
            if not isinstance(part, int) or part >= len(node):
                raise ConfigError(f"{override!r}: there is no list entry {part}; the list has {len(node)}")
        elif not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {part!r} is not inside a section")
        if following is None:
            node[part] = value
        else:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]
    return key


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        # On Python 3.10 tuple[str, ...] is a type, too, of which issubclass wants nothing to know.
        if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _line(tree: yaml.Node | None, key: Key) -> int | None:
    """The line of a key in the YAML text, or of its nearest section that is there; None when none is."""
    line, node = None, tree
    for part in key:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((name, value) for name, value in node.value if name.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part], node.value[part])
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _validate(root: type[R], values: dict[str, Any], where: Where) -> R:
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, root, where)) from None


def _explain(error: ValidationError, root: type[BaseModel], where: Where) -> str:
    problems = error.errors()
    first = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    key = _key_of(first["loc"], root)
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 and first["type"] == "extra_forbidden" else ""
    if first["type"] == "extra_forbidden":
        near = _nearest(key, root)
        hint = f"; did you mean {near}?" if near else f"; known here: {', '.join(_siblings(key, root))}"
        return f"{where(key)}: unknown key {_dotted(key)}{hint}{rest}"
    if first["type"] == "missing":
        return f"{where(key)}: missing key {_dotted(key)}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    message = message.replace("input should be", "expected").partition(", unable")[0]
    if first["type"] in ("model_type", "model_attributes_type"):
        message = "expected a section with keys of its own"
    name = f"{_dotted(key)}: " if key else ""
    value = first["input"]
    got = f", got {value!r}" if isinstance(value, str | int | float | bool | type(None)) else ""
    return f"{where(key)}: {name}{message}{got}"


def _key_of(location: Key, root: type[BaseModel]) -> Key:
    """A pydantic error location without the union branches that pydantic adds to it."""
    key: list[str | int] = []
    section: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            key.append(part)
        elif section is not None:
            key.append(part)
            field = section.model_fields.get(part)
            section = _section_of(field.annotation) if field else None
    return tuple(key)


def _siblings(key: Key, root: type[BaseModel]) -> list[str]:
    """The known keys of the section that ``key`` stands in."""
    section = _dotted(tuple(part for part in key[:-1] if isinstance(part, str)))
    return [known.rpartition(".")[2] for known in known_keys(root) if known.rpartition(".")[0] == section]


def _nearest(key: Key, root: type[BaseModel]) -> str | None:
    """The known key closest to a wrong one: of the same name elsewhere, else close in its section, else anywhere."""
    name, keys = str(key[-1]), known_keys(root)
    elsewhere = [known for known in keys if known.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[0]
    same = difflib.get_close_matches(name, _siblings(key, root), n=1)
    if same:
        return _dotted((*key[:-1], same[0]))
    close = difflib.get_close_matches(name, [known.rpartition(".")[2] for known in keys], n=1, cutoff=0.8)
    return next(known for known in keys if known.rpartition(".")[2] == close[0]) if close else None


def _resolve(config: R, folder: Path, given: Sequence[Key], where: Where, check: bool) -> R:
    """Make every path absolute; those of ``given`` keys are relative to the working directory."""

    def absolute(key: Key, value: Path) -> Path:
        base = Path.cwd() if any(key[: len(one)] == one for one in given) else folder
        return Path(os.path.normpath(base / value.expanduser()))

    values = config.model_dump()
    for key, value, marks in _paths(config):
        resolved = absolute(key, value)
        if check and ExistingFile in marks and not resolved.is_file():
            raise ConfigError(f"{where(key)}: {_dotted(key)}: no such file: {resolved}")
        if check and ExistingDirectory in marks and not resolved.is_dir():
            raise ConfigError(f"{where(key)}: {_dotted(key)}: no such directory: {resolved}")
        _assign(values, key, resolved)
    for key in _MODELS:
        name = _value(values, key)
        if isinstance(name, str) and absolute(key, Path(name)).is_dir():
            _assign(values, key, str(absolute(key, Path(name))))
    if "model" not in values:
        return type(config).model_validate(values)
    key = ("model", "path")
    model = Path(values["model"]["path"])
    is_hub_id = len(model.parts) == 2 and not model.is_absolute() and model.parts[0] not in (".", "..", "~")
    resolved = absolute(key, model)
    if resolved.exists() or not is_hub_id:
        if check and not resolved.is_dir():
            raise ConfigError(f"{where(key)}: model.path: no such model directory: {resolved}")
        _assign(values, key, str(resolved))
    return type(config).model_validate(values)


def _value(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _assign(values: Any, key: Key, value: Any) -> None:
    for part in key[:-1]:
        values = values[part]
    values[key[-1]] = value


def _paths(section: BaseModel, prefix: Key = ()) -> Iterator[tuple[Key, Path, set[type]]]:
    """Every path of the configuration: its key, its value, and the marks of its type."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), (*prefix, name)
        marks = _marks(field.annotation) | {type(mark) for mark in field.metadata}
        if isinstance(value, Path):
            yield key, value, marks
        elif isinstance(value, BaseModel):
            yield from _paths(value, key)
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, BaseModel):
                    yield from _paths(entry, (*key, index))
                elif isinstance(entry, Path):
                    yield (*key, index), entry, marks


def _marks(annotation: Any) -> set[type]:
    marks = {type(mark) for mark in getattr(annotation, "__metadata__", ())}
    for argument in getattr(annotation, "__args__", ()):
        marks |= _marks(argument)
    return marks
