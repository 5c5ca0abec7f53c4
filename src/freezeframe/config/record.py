"""Frozen, typed records that know their JSON form.

A subclass only declares its fields; annotations are the schema, so that there is one list of names, types and defaults.
Understood are `bool`, `str`, `U8`…`I32`, names of `VARIANTS`, other records, `X | None` and `tuple[X, ...]`. Own code
rather than dataclasses or msgspec, because importing those takes longer than a whole restore may, and because the Rust
core reads JSON with the error texts that clients of Cloud Hypervisor know.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, Self, dataclass_transform

    from freezeframe._core import JsonSchema
else:

    def dataclass_transform(**_: bool) -> Callable[[type], type]:
        return lambda cls: cls


INTEGERS = {
    "U8": ("u8", 0, 2**8 - 1),
    "U16": ("u16", 0, 2**16 - 1),
    "U32": ("u32", 0, 2**32 - 1),
    "U64": ("u64", 0, 2**64 - 1),
    "Usize": ("usize", 0, 2**64 - 1),
    "I32": ("i32", -(2**31), 2**31 - 1),
}
# Integer fields by the width that CH gives them; to Python they are all `int`.
U8 = int
U16 = int
U32 = int
U64 = int
Usize = int
I32 = int

MISSING: Any = object()
_RECORDS: dict[str, type[Record]] = {}


class Field:
    """One field of a record. `kind` is its annotation without `| None` and `tuple[…, ...]`."""

    __slots__ = ("default", "kind", "many", "name", "optional")

    def __init__(self, name: str, annotation: str, default: object) -> None:
        self.name = name
        self.default = default
        self.optional = annotation.endswith(" | None")
        kind = annotation.removesuffix(" | None")
        self.many = kind.startswith("tuple[")
        self.kind = kind.removeprefix("tuple[").removesuffix(", ...]") if self.many else kind


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """Base of the configuration tree. Instances never change; `replace` makes a changed copy."""

    fields: ClassVar[dict[str, Field]] = {}
    # Enumerations by the name used in annotations: the values as CH spells them in JSON.
    VARIANTS: ClassVar[dict[str, tuple[str, ...]]] = {}
    # Other names under which a field is read (serde's `alias`).
    ALIASES: ClassVar[dict[str, tuple[str, ...]]] = {}
    # Fields left out of JSON when they hold their default (CH prints every other field that is not None).
    QUIET: ClassVar[frozenset[str]] = frozenset()
    # Whether None is printed as null (CH's records without `skip_serializing_none`).
    PRINT_NONE: ClassVar[bool] = False
    # Whether an unknown field is an error.
    STRICT: ClassVar[bool] = True
    _schema: ClassVar[JsonSchema | None] = None

    def __init_subclass__(cls) -> None:
        cls.fields = dict(cls.fields)
        for name, annotation in cls.__annotations__.items():  # the class's own, and strings
            if not annotation.startswith("ClassVar"):
                cls.fields[name] = Field(name, annotation, cls.__dict__.get(name, MISSING))
        cls._schema = None
        _RECORDS[cls.__name__] = cls

    def __init__(self, **values: Any) -> None:
        store = self.__dict__
        for name, field in self.fields.items():
            value = values.pop(name, field.default)
            if value is MISSING:
                raise TypeError(f"{type(self).__name__} needs {name}")
            store[name] = value
        if values:
            raise TypeError(f"{type(self).__name__} has no field {next(iter(values))}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; use replace({name}=…)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        given = (f"{n}={v!r}" for n, v in self.__dict__.items() if v != self.fields[n].default)
        return f"{type(self).__name__}({', '.join(given)})"

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return type(self)(**(self.__dict__ | changes))

    def to_plain(self) -> dict[str, Any]:
        """The record as dicts, lists and scalars, with every default filled in, as CH prints it."""
        plain: dict[str, Any] = {}
        for name, field in self.fields.items():
            value = self.__dict__[name]
            if (value is None and not self.PRINT_NONE) or (name in self.QUIET and value == field.default):
                continue
            plain[name] = _plain(value)
        return plain

    def to_json(self) -> str:
        """`to_plain` as one line of ASCII JSON."""
        from freezeframe._core import json_line

        return json_line(self.to_plain()).decode("ascii")

    @classmethod
    def from_json(cls, document: bytes) -> Self:
        """Read a JSON document. `ValueError` with serde_json's text when it is not one of these."""
        return cls._build(cls.schema().load(document))

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Read what `to_plain` gave. `ValueError` when it is not one of these."""
        return cls._build(cls.schema().check(plain))

    @classmethod
    def schema(cls) -> JsonSchema:
        """The core's reader of this record; built once."""
        if cls._schema is None:
            from freezeframe._core import JsonSchema

            cls._schema = JsonSchema(cls.describe())
        return cls._schema

    @classmethod
    def describe(cls) -> tuple[Any, ...]:
        """The description that `JsonSchema` takes."""
        fields = [
            (name, cls._describe_field(field), field.default is MISSING, list(cls.ALIASES.get(name, ())))
            for name, field in cls.fields.items()
        ]
        return ("record", cls.__name__, fields, cls.STRICT)

    @classmethod
    def _describe_field(cls, field: Field) -> tuple[Any, ...]:
        kind = field.kind
        one: tuple[Any, ...]
        if kind in INTEGERS:
            one = ("int", *INTEGERS[kind])
        elif kind in cls.VARIANTS:
            one = ("enum", list(cls.VARIANTS[kind]))
        elif kind in _RECORDS:
            one = _RECORDS[kind].describe()
        else:
            one = (kind,)
        if field.many:
            one = ("list", one)
        return ("optional", one) if field.optional else one

    @classmethod
    def _build(cls, values: dict[str, Any]) -> Self:
        for name, value in values.items():
            field = cls.fields[name]
            record = _RECORDS.get(field.kind)
            if value is None:
                continue
            if field.many:
                values[name] = tuple(record._build(item) for item in value) if record else tuple(value)  # noqa: SLF001
            elif record:
                values[name] = record._build(value)  # noqa: SLF001
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_plain()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value
