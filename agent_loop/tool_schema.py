"""JSON schemas of tools: made of a function's annotations, and what a model gave checked against them."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    dict: "object",
}
_LISTS, _MAPPINGS = (list, tuple, Sequence), (dict, Mapping)

_IS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of the arguments of `function`: those without a default are required, and no other is allowed.

    Raises:
        ValueError: an annotation is none that JSON has, or there is `*args` or a parameter by position only.
    """
    properties, required, open_ended = dict[str, Any](), list[str](), False
    hints = get_type_hints(_annotated(function), include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ValueError(f"its parameter {parameter} has no name that a model could give; tools are called by keyword")
        properties[name] = _schema(hints.get(name, Any), name)
        if parameter.default is parameter.empty:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": open_ended}


def _annotated(function: Callable[..., Any]) -> Any:
    """What has the annotations of `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else getattr(function, "__call__")  # noqa: B004, B009


def _schema(hint: Any, name: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Annotated:
        said = [one for one in inner[1:] if isinstance(one, str)]
        return _schema(inner[0], name) | ({"description": said[0]} if said else {})
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(one, name) for one in inner]}
    if origin is list or origin is Sequence:
        return {"type": "array", "items": _schema(inner[0], name)}
    if origin in _MAPPINGS and inner[0] is str:
        return {"type": "object", "additionalProperties": _schema(inner[1], name)}
    raise ValueError(f"{name}: {hint} is no type that JSON has; annotate with str, int, float, bool, list, dict, Literal or unions of them")


def mismatch(schema: Mapping[str, Any], value: Any, place: str = "arguments") -> str | None:
    """Why `value` is not as `schema` says, or None.

    Looked at are `type`, `enum`, `const`, `anyOf`, `properties`, `required`, `additionalProperties` and `items`.
    """
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if kinds and not any(_IS[kind](value) for kind in kinds):
        return f"{place} is {_shown(value)}, and must be of type {' or '.join(kinds)}"
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices is not None and not any(type(value) is type(one) and value == one for one in choices):
        return f"{place} is {_shown(value)}, and must be one of {choices}"
    if (ways := schema.get("anyOf")) is not None:
        reasons = [mismatch(one, value, place) for one in ways]
        if all(reasons):
            return "; or ".join(str(reason) for reason in reasons)
    if isinstance(value, dict):
        return _mapping_mismatch(schema, value, place)
    if isinstance(value, list) and isinstance(items := schema.get("items"), Mapping):
        return next((why for n, one in enumerate(value) if (why := mismatch(items, one, f"{place}[{n}]"))), None)
    return None


def _mapping_mismatch(schema: Mapping[str, Any], value: dict[str, Any], place: str) -> str | None:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if missing := [name for name in schema.get("required", ()) if name not in value]:
        return f"{place} lacks {missing[0]!r}"
    for name, one in value.items():
        if name not in known and others is False:
            return f"{place} has {name!r:.60}, and may have {sorted(known)}"
        within = known.get(name, others)
        if isinstance(within, Mapping) and (why := mismatch(within, one, f"{place}.{name:.60}")):
            return why
    return None


def check_schema(schema: Any) -> None:
    """Raise `ValueError` unless `schema` is one of a mapping, and no part of it names a type that there is not."""
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise ValueError(f"parameters={schema!r:.80} is no JSON schema of type object")
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        kinds = part.get("type", ())
        if unknown := [kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind not in _IS]:
            raise ValueError(f"parameters name a type {unknown[0]!r:.40}; JSON schemas have {sorted(_IS)}")
        inner = [*part.get("properties", {}).values(), *part.get("anyOf", ()), part.get("items"), part.get("additionalProperties")]
        parts += [one for one in inner if isinstance(one, Mapping)]


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
