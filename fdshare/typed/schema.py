"""From annotated attrs classes to the functions that pack, check and unpack their objects.

A value becomes plain MessagePack, by msgspec; what arrives is checked against types made for it, in C, before any object of
a message class exists:

============================ =========================================================================
type                         MessagePack
============================ =========================================================================
message class                array: the class's name, then every field in order
bool, int, float, str, bytes itself; integers from -2**63 to 2**64 - 1; a float is never an integer
None, Optional               nil, or the value
Enum                         str: the member's name
Flag                         integer
Literal                      the value
list, tuple, set, frozenset  array
dict                         array of arrays of two
other unions                 array: the number of the alternative (by description, from 0), the value
descriptor                   integer: its place among the message's descriptors
============================ =========================================================================

Nothing is converted on the way in, nothing may be missing, nothing may be added, and no key or element may come twice.
"""

from __future__ import annotations

import enum
import operator
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, Union

import attrs
import msgspec

from fdshare.typed.fields import Descriptor, Receiving, Sending, field_of
from fdshare.typed.values import (
    PLAIN,
    Node,
    Pack,
    Unpack,
    Wrong,
    alternatives_node,
    bounded,
    classes_node,
    descriptor_node,
    dict_node,
    enum_node,
    expected,
    literal_node,
    meta_text,
    optional_node,
    sequence_node,
    tuple_node,
)

__all__ = ["Schema", "Wrong"]


class Schema:
    """The closed set of types that a codec speaks.

    Args:
        message_types: attrs classes.

    Raises:
        TypeError: something in them cannot be checked, or is none.
        ValueError: two classes have one name, or there are none.
    """

    def __init__(self, message_types: tuple[type, ...]) -> None:
        if not message_types:
            raise ValueError("TypedCodec needs the message classes: TypedCodec(Request, Reply)")
        self._names = {cls.__name__: cls for cls in message_types if isinstance(cls, type)}
        self._nodes: dict[type, Node] = {}
        self._open: list[type] = []
        self._definitions: dict[str, str] = {}
        self.recursive = False
        """Whether a message can be nested without an end."""
        self.bounded = False
        """Whether something is bounded that only the receiver's check sees."""
        self.counted = False
        """Whether something costs more than the values in it say, or time by its sender's choice."""
        self.descriptors = False
        """Whether any field holds a descriptor."""
        nodes = [self._class(cls, "message type") for cls in dict.fromkeys(message_types)]
        self.root = nodes[0] if len(nodes) == 1 else classes_node(nodes)
        self.text = "\n".join(
            [self.root.text, *(self._definitions[name] for name in sorted(self._definitions))]
        )

    @property
    def depth(self) -> int:
        """Levels of nesting in a message, without what is recursive."""
        return self.root.depth

    def coders(self) -> tuple[Callable[[Any], bytes], Callable[[Any], Any]]:
        """Return the functions from packed values to bytes, and from bytes to what ``root.unpack`` takes."""
        return msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(self.root.wire).decode

    def check_bounds(self, data: bytes, from_bytes: Callable[[Any], Any]) -> None:
        """Check what only the receiver's check sees: the ``msgspec.Meta`` of annotations.

        Raises:
            Wrong: a value is outside of its bounds.
        """
        try:
            from_bytes(data)
        except msgspec.ValidationError as error:
            raise Wrong(None, str(error)) from error

    def _class(self, cls: type, what: str) -> Node:
        if cls in self._nodes:
            if cls in self._open:
                self.recursive = True
            return self._nodes[cls]
        if not isinstance(cls, type) or not attrs.has(cls):
            raise TypeError(f"{what}: {cls!r} is not an attrs class")
        name = cls.__name__
        if name in self._definitions:
            raise ValueError(f"two message classes are named {name}: what arrives could be either")
        fields = [a for a in attrs.fields(cls) if a.init]
        # The field types are not known yet: msgspec looks for such names in the class when it first decodes.
        places = [f"_type_{number}" for number in range(len(fields))]
        wire: Any = msgspec.defstruct(
            name,
            [(f"f{number}", place) for number, place in enumerate(places)],
            tag=name,
            array_like=True,
            forbid_unknown_fields=True,
        )
        packs: list[Pack] = []  # both filled below: a class may hold itself
        unpacks: list[tuple[int, Unpack]] = []
        pack, unpack = _pack_class(cls, fields, packs), _unpack_class(cls, fields, unpacks)
        node = self._nodes[cls] = Node(name, wire, frozenset({cls}), pack, unpack, hashable=False)
        self._definitions[name] = ""
        self._open.append(cls)
        hints = self._hints(cls)
        children = [self._node(hints.get(a.name, a.type or Any), f"{name}.{a.name}") for a in fields]
        self._open.pop()
        node.depth = 1 + max((child.depth for child in children), default=0)
        for place, child in zip(places, children, strict=True):
            setattr(wire, place, child.wire)
        packs += [child.pack for child in children]
        unpacks += [(i, child.unpack) for i, child in enumerate(children) if child.unpack is not None]
        described = (f"{a.name}: {child.text}" for a, child in zip(fields, children, strict=True))
        self._definitions[name] = f"{name}({', '.join(described)})"
        return node

    def _hints(self, cls: type) -> dict[str, Any]:
        """Resolve the annotations of a class, strings among them."""
        try:
            return typing.get_type_hints(cls, localns={**self._names, cls.__name__: cls}, include_extras=True)
        except Exception as error:
            raise TypeError(
                f"the annotations of {cls.__name__} cannot be resolved ({error}): names in them must be of the module "
                "in which it is defined"
            ) from error

    def _node(
        self, annotation: Any, what: str, options: Descriptor | None = None, meta: Iterable[Any] = ()
    ) -> Node:
        """Return how values of an annotation travel; ``options`` and ``meta`` are from an ``Annotated`` around it."""
        meta = list(meta)
        origin = typing.get_origin(annotation)
        if origin is Annotated:
            inner, *extras = typing.get_args(annotation)
            for extra in extras:
                if isinstance(extra, Descriptor):
                    options = extra
                elif isinstance(extra, msgspec.Meta):
                    meta.append(extra)
                    self.bounded = True
            return self._node(inner, what, options, meta)
        if isinstance(annotation, typing.NewType):
            return self._node(annotation.__supertype__, what, options, meta)
        if type(annotation).__name__ == "TypeAliasType":  # of Python 3.12
            return self._node(annotation.__value__, what, options, meta)
        field = field_of(annotation, options)
        if field is not None:
            self.descriptors = True
            return descriptor_node(field)
        if options is not None:
            raise TypeError(f"{what}: Descriptor(...) goes with a file, a socket, a Channel or an FdHandle")
        return self._value(annotation, origin, what, meta)

    def _value(self, annotation: Any, origin: Any, what: str, meta: list[Any]) -> Node:
        arguments = typing.get_args(annotation)
        if annotation is None or annotation in PLAIN:
            node = PLAIN[annotation if annotation is not None else types.NoneType]
            return attrs.evolve(node, text=node.text + meta_text(meta), wire=bounded(node.wire, meta))
        if origin in (set, frozenset, dict) or (
            isinstance(annotation, type) and issubclass(annotation, enum.Flag)
        ):
            self.counted = True
        if origin in (list, set, frozenset) and arguments:
            return sequence_node(origin, self._node(arguments[0], what), meta, what)
        if origin is tuple and arguments:
            if arguments[1:] == (...,):
                return sequence_node(tuple, self._node(arguments[0], what), meta, what)
            return tuple_node([self._node(item, what) for item in arguments])
        if origin is dict:
            key, value = (self._node(item, what) for item in arguments)
            return dict_node(key, value, meta, what)
        if origin in (Union, types.UnionType):
            return self._union(arguments, what)
        if origin is Literal:
            return literal_node(arguments, what)
        if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
            return enum_node(annotation)
        if isinstance(annotation, type) and attrs.has(annotation):
            return self._class(annotation, what)
        raise TypeError(f"{what}: {_refusal(annotation)}")

    def _union(self, arguments: tuple[Any, ...], what: str) -> Node:
        members = [argument for argument in arguments if argument is not types.NoneType]
        nodes = [self._node(member, what) for member in members]
        if len(nodes) == 1:
            node = nodes[0]
        elif all(
            isinstance(member, type) and attrs.has(member) and member in self._nodes for member in members
        ):
            node = classes_node(nodes)
        else:
            node = alternatives_node(nodes, what)
        return node if len(members) == len(arguments) else optional_node(node)


def _refusal(annotation: Any) -> str:
    if annotation in (list, tuple, set, frozenset, dict):
        return f"{annotation.__name__} must say of what, such as {annotation.__name__}[str]"
    if annotation in (Any, object):
        return "it must say what it is: anything at all cannot be checked"
    if isinstance(annotation, TypeVar):
        return "generic classes are not supported"
    return (
        f"{annotation!r} cannot be checked; known are bool, int, float, str, bytes, None, enums, Literal, list, tuple, "
        "set, frozenset, dict, unions, attrs classes, FdHandle, files, socket.socket and Channel"
    )


def _pack_class(cls: type, fields: list[Any], packs: list[Pack]) -> Pack:
    name = cls.__name__
    names = [a.name for a in fields]
    values_of: Callable[[Any], Iterable[Any]]
    if len(names) > 1:
        values_of = operator.attrgetter(*names)
    else:

        def values_of(obj: Any) -> Iterable[Any]:
            return [getattr(obj, field) for field in names]

    def pack(value: Any, sending: Sending) -> Any:
        if type(value) is not cls:
            return expected(pack, value, sending, name)
        packed: list[Any] = [name]
        try:
            for item, pack_item in zip(values_of(value), packs, strict=True):
                packed.append(pack_item(item, sending))
        except Wrong as wrong:
            wrong.path.append(f".{names[len(packed) - 1]}")
            raise
        return packed

    return pack


def _unpack_class(cls: type, fields: list[Any], unpacks: list[tuple[int, Unpack]]) -> Unpack:
    positional = not any(a.kw_only for a in fields)
    names = [a.alias for a in fields]
    as_tuple = msgspec.structs.astuple

    def unpack(value: Any, receiving: Receiving) -> Any:
        values: Any = as_tuple(value)
        if unpacks:
            values = [*values]
            for place, unpack_item in unpacks:
                values[place] = unpack_item(values[place], receiving)
        return cls(*values) if positional else cls(**dict(zip(names, values, strict=True)))

    return unpack
