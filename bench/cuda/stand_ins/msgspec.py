"""What this tree asks of the library msgspec, in plain Python, for machines of the GPU bench that lack it.
`tree.py` puts it on the path only there; it is slower, and no server runs on it."""

from __future__ import annotations

import base64
import dataclasses
import enum
import inspect
import json as _json
import math
import types
import typing
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class MsgspecError(Exception):
    """Base of all."""


class DecodeError(MsgspecError):
    """Not the format."""


class ValidationError(DecodeError):
    """The format, but not the type."""


class Raw(bytes):
    """A part that is decoded later."""


class UnsetType(enum.Enum):
    """A field that is left out."""

    UNSET = "UNSET"


UNSET = UnsetType.UNSET


class Meta:
    """A constraint, which is not checked here."""

    def __init__(self, **constraints: object) -> None:
        self.constraints = constraints


class Struct:
    """A dataclass with the options of msgspec's structs; those about encoding have no effect here."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()
        cls.__forbid_unknown__ = options.get("forbid_unknown_fields", False)
        # Mutable defaults are made anew for each, as msgspec does.
        for name in inspect.get_annotations(cls):
            if isinstance(default := cls.__dict__.get(name), list | dict | set):
                setattr(cls, name, dataclasses.field(default_factory=type(default)))
        dataclasses.dataclass(
            frozen=options.get("frozen", False), kw_only=options.get("kw_only", False), eq=True
        )(cls)


def to_builtins(value: Any, **_: Any) -> Any:
    """Dictionaries, lists, text and numbers."""
    if isinstance(value, Raw):
        return _json.loads(value)
    if dataclasses.is_dataclass(value):
        fields = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
        return {name: to_builtins(part) for name, part in fields if part is not UNSET}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(to_builtins(key)): to_builtins(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_builtins(part) for part in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def convert(value: Any, type: Any, **_: Any) -> Any:
    """`value`, of dictionaries, lists, text and numbers, as `type`, or ValidationError."""
    return _converted(value, type, "$")


def _converted(value: Any, kind: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or kind is object or isinstance(kind, typing.TypeVar):
        return value
    if origin is Annotated:
        return _converted(value, arguments[0], path)
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, path)
    if origin is Literal:
        return _expected(value, value in arguments, kind, path)
    if kind is None or kind is types.NoneType:
        return _expected(value, value is None, kind, path)
    if kind is Raw:
        return Raw(_json.dumps(value).encode())
    if dataclasses.is_dataclass(kind):
        return _object(value, kind, path)
    return _plain(value, kind, origin or kind, arguments, path)


def _plain(value: Any, kind: Any, base: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return base(_expected(value, value in {each.value for each in base}, kind, path))
    if base is bool:
        return _expected(value, isinstance(value, bool), kind, path)
    if base is int:
        return _expected(value, isinstance(value, int) and not isinstance(value, bool), kind, path)
    if base is float:
        _expected(value, isinstance(value, int | float) and not isinstance(value, bool), kind, path)
        return float(value)
    if base is str:
        return _expected(value, isinstance(value, str), kind, path)
    if base is bytes:
        return base64.b64decode(_expected(value, isinstance(value, str), kind, path))
    if base is tuple and arguments and Ellipsis not in arguments:
        _expected(value, isinstance(value, list | tuple) and len(value) == len(arguments), kind, path)
        parts = zip(value, arguments, strict=True)
        return tuple(_converted(part, each, f"{path}[{i}]") for i, (part, each) in enumerate(parts))
    if issubclass(base, dict | typing.Mapping.__origin__) and not isinstance(value, list):
        _expected(value, isinstance(value, dict), kind, path)
        keys, values = arguments or (Any, Any)
        made = ((int(key) if keys is int else key, part) for key, part in value.items())
        return {key: _converted(part, values, f"{path}.{key}") for key, part in made}
    _expected(value, isinstance(value, list | tuple), kind, path)
    each = arguments[0] if arguments else Any
    made = (_converted(part, each, f"{path}[{i}]") for i, part in enumerate(value))
    return tuple(made) if base is tuple else frozenset(made) if base is frozenset else list(made)


def _object(value: Any, kind: Any, path: str) -> Any:
    if isinstance(value, kind):
        return value
    _expected(value, isinstance(value, dict), kind, path)
    hints = get_type_hints(kind, include_extras=True)
    fields = {each.name: each for each in dataclasses.fields(kind) if each.init}
    if getattr(kind, "__forbid_unknown__", False) and (unknown := set(value) - set(fields)):
        raise ValidationError(f"Object contains unknown field `{min(unknown)}` - at `{path}`")
    made = {name: _converted(value[name], hints[name], f"{path}.{name}") for name in fields if name in value}
    missing = dataclasses.MISSING
    for name, field in fields.items():
        if name not in made and field.default is missing and field.default_factory is missing:
            raise ValidationError(f"Object missing required field `{name}` - at `{path}`")
    return kind(**made)


def _one_of(value: Any, kinds: tuple[Any, ...], path: str) -> Any:
    for kind in kinds:
        try:
            return _converted(value, kind, path)
        except (ValidationError, TypeError):
            continue
    raise ValidationError(f"Expected one of {kinds}, got `{type(value).__name__}` - at `{path}`")


def _expected(value: Any, holds: bool, kind: Any, path: str) -> Any:
    if not holds:
        name = getattr(kind, "__name__", str(kind))
        raise ValidationError(f"Expected `{name}`, got `{type(value).__name__}` - at `{path}`")
    return value


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_sorted(part) for part in value]
    return value


def _encode(value: Any, *, order: str | None = None, **_: Any) -> bytes:
    made = to_builtins(_sorted(value) if order else value)
    return _json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()


def _decode(data: Any, *, type: Any = Any, **_: Any) -> Any:
    text = data if isinstance(data, str) else bytes(data)
    try:
        value = _json.loads(text)
    except ValueError as error:
        raise DecodeError(f"JSON is malformed: {error}") from error
    return convert(value, type)


class _Encoder:
    def __init__(self, **_: Any) -> None:
        self.encode = _encode


class _Decoder:
    def __init__(self, type: Any = Any, **_: Any) -> None:
        self._type = type

    def decode(self, data: Any) -> Any:
        return _decode(data, type=self._type)


def _formatted(data: Any, *, indent: int = 2) -> Any:
    text = _json.dumps(_json.loads(data), indent=indent, ensure_ascii=False)
    return text if isinstance(data, str) else text.encode()


# Nobody reads these bytes but who wrote them, so that one text form serves both formats.
json = types.SimpleNamespace(
    encode=_encode, decode=_decode, format=_formatted, Encoder=_Encoder, Decoder=_Decoder
)
msgpack = types.SimpleNamespace(encode=_encode, decode=_decode, Encoder=_Encoder, Decoder=_Decoder)
structs = types.SimpleNamespace(replace=dataclasses.replace, asdict=dataclasses.asdict)
