"""YAML read strictly into frozen dataclasses: what is unknown, missing, mistyped or out of range is an error.

A dataclass checks its values in `__post_init__` with `require`; `build` says where in the file they stand.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Any, Literal

import yaml

from danet_core.files import StudyError


class ConfigError(StudyError):
    """params.yaml, or a name looked up in it, is not what the study expects."""


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once, and a number is what it is in YAML 1.2, as which DVC reads the file.

    `5e-4` is one. `010`, `1_000` and `1:30` are 8, 1000 and 90 in YAML 1.1 only: here they are text, and so refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key.value}` stands twice; remove one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_bool = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_int = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_float = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _bool, list("tTfF"))
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", _int, list("-+0123456789"))
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _float, list("-+.0123456789"))


def build(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed YAML into `kind`, strictly: no unknown, missing or mistyped value passes."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):  # True and 1.0 are equal to 1
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r}")
        return value
    if origin is tuple:
        return _build_tuple(arguments, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), where, "a mapping", value)
        return {key: build(arguments[1], item, f"{where}{_join(where)}{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if kind is float:
        _expect(
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
            where,
            "a number",
            value,
        )
        return float(value)
    if kind is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), where, "a whole number", value)
        return value
    _expect(isinstance(value, kind), where, f"a {kind.__name__}", value)
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, "a mapping", value)
    hints = typing.get_type_hints(kind)
    unknown = sorted(str(key) for key in value if key not in hints)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(hints))}")
    missing = sorted(key for key in hints if key not in value)
    if missing:
        raise ConfigError(f"{where}: key {missing[0]!r} is missing; add it")
    fields = {key: build(hint, value[key], f"{where}{_join(where)}{key}") for key, hint in hints.items()}
    try:
        return kind(**fields)
    except OutOfRange as error:
        raise ConfigError(
            f"{where}{_join(where)}{error.key}: expected {error.expected}, found {_show(error.found)}"
        ) from None


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in arguments:
        return None
    choices = [kind for kind in arguments if kind is not types.NoneType]
    if len(choices) > 1 and isinstance(
        value, dict
    ):  # the member that shares most keys with the value gives the best message
        choices.sort(key=lambda kind: -len(set(typing.get_type_hints(kind)) & set(value)))
    return build(choices[0], value, where)


def _build_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), where, "a list", value)
    if arguments[-1] is Ellipsis:
        return tuple(build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    _expect(len(value) == len(arguments), where, f"a list of {len(arguments)} values", value)
    return tuple(
        build(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


class OutOfRange(Exception):
    def __init__(self, key: str, found: Any, expected: str) -> None:
        self.key, self.found, self.expected = key, found, expected


def require(condition: bool, key: str, found: Any, expected: str) -> None:
    if not condition:
        raise OutOfRange(key, found, expected)


def _expect(condition: bool, where: str, expected: str, found: Any) -> None:
    if not condition:
        raise ConfigError(f"{where}: expected {expected}, found {_show(found)}")


def _join(where: str) -> str:
    return "." if ":" in where else ": "  # params.yaml: datasets.sysu.image


def _show(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
