"""Configuration: frozen pydantic models, dotted assignments, fingerprints and differences.

What is unusual: a bad config reports every fault at once, each with its dotted path, and an unknown
key names the nearest known one. An element of a list is addressed by its number or by its `name`:
`stages.sft.loop.epochs=2`. Infinity and NaN are refused everywhere; "off" is None.
"""

import difflib
import hashlib
import json
import reprlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from phikit.base.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: immutable, closed to unknown keys, plain data only."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # fields such as `model_path` are ordinary names here
    )

    @classmethod
    def resolve(cls, data: Mapping[str, Any], assignments: Sequence[str] = ()) -> Self:
        """Build a config from plain data and `a.b=value` assignments, in order.

        Values are read as JSON, else taken as text: `lr=2e-5`, `name=base`, `top_k=null`. An item
        of a list goes by its number or by its `name`: `stages.0.steps=9`, `stages.sft.steps=9`.

        Raises:
            ConfigError: lists every fault found, with dotted paths.
        """
        plain = _plain(data)
        faults = []
        for assignment in assignments:
            fault = _assign(plain, assignment, cls)
            if fault is not None:
                faults.append(fault)
        config = None
        try:
            config = cls.model_validate(plain)
        except ValidationError as error:
            faults += [_describe(fault, cls, plain) for fault in error.errors()]
        if faults or config is None:
            count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
            lines = "".join(f"\n  {fault}" for fault in faults)
            raise ConfigError(f"{cls.__name__} has {count}:{lines}", fix="correct these settings")
        return config

    @classmethod
    def read(cls, path: Path, *, fix: str) -> Self:
        """The config in a `.toml` or `.json` file.

        Args:
            fix: where to read what such a file holds, for the error about one that holds nothing.

        Raises:
            ConfigError: the file cannot be read, or its settings cannot be used.
        """
        try:
            text = path.read_text(encoding="utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}", fix="check the path"
            ) from error
        except (ValueError, RecursionError) as error:  # of TOML, of JSON, of UTF-8
            raise ConfigError(f"{path} is neither TOML nor JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds no settings", fix=fix)
        return cls.resolve(data)

    def override(self, assignments: Sequence[str]) -> Self:
        """A copy with `a.b=value` assignments applied and everything validated again."""
        return type(self).resolve(dict(self), assignments)


class Difference(NamedTuple):
    """One setting that two configs do not share; `ABSENT` stands for a missing side."""

    path: str
    a: Any
    b: Any


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


def fingerprint(value: Any) -> str:
    """32 hex digits that identify a Config or any JSON-able value, whatever its key order."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def differences(a: Any, b: Any) -> list[Difference]:
    """Every leaf at which two JSON-able values differ, in the order of `a` and then of `b`."""
    return list(_differences("", a, b))


def _differences(path: str, a: Any, b: Any) -> Iterator[Difference]:
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        if a != b or type(a) is not type(b):
            yield Difference(path, a, b)
        return
    for key in [*a, *(key for key in b if key not in a)]:
        inner = f"{path}.{key}" if path else str(key)
        yield from _differences(inner, a.get(key, ABSENT), b.get(key, ABSENT))


def _plain(value: Any) -> Any:
    """A copy made of dicts and lists, which assignments may change."""
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _assign(data: dict[str, Any], assignment: str, model: type[BaseModel]) -> str | None:
    """Apply one assignment in place; returns the fault, or None."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"{assignment!r}: not of the form a.b=value"
    node: Any = data
    models = [model]
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(node, list):
            place = _element(node, key)
            if place is None:
                near = "" if key.isdecimal() else _nearest(key, _names(node))
                return f"{path}: {'.'.join(keys[:depth])} has no item {key!r}{near}"
        elif not isinstance(node, dict):
            return f"{path}: {'.'.join(keys[:depth])} is a single value and has no settings inside"
        if depth == len(keys) - 1:
            node[place] = _value(text)
            break
        if isinstance(node, dict):
            models = _narrowed(models, node.get("kind"))
            if node.get(key) is None:
                # A partial assignment refines the default sub-config; it must not replace it.
                node[key] = _default(models, key)
            models = _models_under(models, key)
        node = node[place]
    return None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _element(elements: list[Any], key: str) -> int | None:
    """The place of an element that is given by its number or by its name."""
    if key.isdecimal() and int(key) < len(elements):
        return int(key)
    names = _names(elements)
    return names.index(key) if key in names else None


def _names(elements: Sequence[Any]) -> list[str]:
    """What each element of a list is called: its `name`, else its number."""
    return [
        str(element.get("name", number)) if isinstance(element, dict) else str(number)
        for number, element in enumerate(elements)
    ]


def _default(models: Sequence[type[BaseModel]], key: str) -> Any:
    """The default of the field `key` where assignments can go inside it, else an empty dict."""
    for model in models:
        if key in model.model_fields:
            default = model.model_fields[key].get_default(
                call_default_factory=True, validated_data={}
            )
            if isinstance(default, BaseModel | list | tuple | Mapping):
                return _plain(default)
    return {}


def _models_under(models: Sequence[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    """The models that the field `key` may hold, inside lists and unions too."""
    fields = [model.model_fields[key] for model in models if key in model.model_fields]
    return [inner for field in fields for inner in _models_in(field.annotation)]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _narrowed(models: Sequence[type[BaseModel]], tag: object) -> list[type[BaseModel]]:
    """Of the members of a union, those whose `kind` or class is `tag`; all when none is."""
    tagged = [
        model
        for model in models
        if tag == model.__name__
        or ("kind" in model.model_fields and model.model_fields["kind"].default == tag)
    ]
    return tagged or list(models)


def _describe(fault: Any, model: type[BaseModel], data: dict[str, Any]) -> str:
    """One line for one pydantic fault."""
    parts, models = _located(fault["loc"], model, data)
    path = ".".join(parts) or "(whole config)"
    if fault["type"] == "missing":
        return f"{path}: required and not given"
    if fault["type"] == "extra_forbidden":
        known = [name for inner in models for name in inner.model_fields]
        return f"{path}: unknown setting{_nearest(parts[-1], known)}"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(fault["input"], Mapping):  # a rule about several settings together
        return f"{path}: {message}"
    return f"{path}: {message}, got {reprlib.repr(fault['input'])}"


def _located(
    location: Sequence[str | int], model: type[BaseModel], data: Any
) -> tuple[list[str], list[type[BaseModel]]]:
    """A fault's path as an assignment writes it, and the models that may own its last part.

    Pydantic puts the tag of a union into its locations, and numbers where elements have names.
    """
    parts: list[str] = []
    node, models, owners = data, [model], [model]
    for index, part in enumerate(location):
        owners = models
        if isinstance(node, list) and isinstance(part, int):
            parts.append(_names(node)[part])
            node = node[part]
            continue
        is_field = any(part in owner.model_fields for owner in owners)
        narrowed = _narrowed(owners, part)
        is_tag = len(narrowed) < len(owners) or (owners and not is_field)
        if is_tag and index < len(location) - 1:  # asked first: a kind may name a setting too
            models = narrowed
            continue
        parts.append(str(part))
        models = _models_under(owners, str(part))
        node = node.get(part) if isinstance(node, dict) else None
    return parts, owners


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?" if near else ""
