"""How values of each sort of type travel in typed messages: packed and checked at the sender, checked and unpacked on arrival.

Whatever needs no second look on arrival has no ``unpack``: msgspec has checked it in C.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import Annotated, Any, Union

import attrs
import msgspec

from fdshare.errors import DecodeError
from fdshare.handle import Moved
from fdshare.reducers import Refused
from fdshare.typed.costs import COMBINED, DICT, MAX_HASHED, SET, Cost
from fdshare.typed.fields import Field, Receiving, Sending
from fdshare.typed.flags import let_go

__all__ = ["MAX_HASHED", "Node", "Wrong"]

_MIN_INT, _MAX_INT = -(1 << 63), (1 << 64) - 1

_EXACT_FLOAT = 1 << 53
"""Integers up to this size are floats without a loss."""

Pack = Callable[[Any, Sending], Any]
Unpack = Callable[[Any, Receiving], Any]


class Wrong(Exception):
    """Inside the encoder: ``value`` is not of the field's type; ``path`` grows on the way out."""

    def __init__(self, value: Any, reason: str) -> None:
        super().__init__(reason)
        self.value = value
        self.reason = reason
        self.path: list[str] = []


@attrs.define(eq=False)
class Node:
    """How values of one type travel."""

    text: str
    """What both ends must agree on."""
    wire: Any
    """The type that msgspec checks."""
    accepts: frozenset[type]
    """The exact types of its values."""
    pack: Pack
    """Returns what msgspec encodes; raises Wrong."""
    unpack: Unpack | None = None
    """Makes the value of what msgspec decoded; None where that is the value itself."""
    hashed: bool = False
    """Whether it is hashable by a hash that the sender can choose."""
    made: bool = False
    """Whether it is made of others, so that many of one hash can be made."""
    hashable: bool = True
    depth: int = 0
    """Levels of arrays in it, without what is recursive."""


def _list_of(wire: Any) -> Any:
    return types.GenericAlias(list, (wire,))


def _tuple_of(*wires: Any) -> Any:
    return types.GenericAlias(tuple, wires)


def _union_of(*wires: Any) -> Any:
    return Union[wires]  # noqa: UP007 -- of as many as there are


def expected(pack: Pack, value: Any, sending: Sending, what: str) -> Any:
    """Look into ``move(...)``; refuse anything else."""
    if type(value) is not Moved:
        raise Wrong(value, f"expected {what}")
    sending.moving += 1
    try:
        return pack(value.obj, sending)
    finally:
        sending.moving -= 1


# --- plain values ------------------------------------------------------------------------------------------------------


def _plain(cls: type) -> Node:
    name = cls.__name__

    def pack(value: Any, sending: Sending) -> Any:
        if type(value) is cls:
            return value
        return expected(pack, value, sending, name)

    return Node(name, cls, frozenset({cls}), pack)


def _pack_str(value: Any, sending: Sending) -> Any:
    if type(value) is str:
        try:
            if not value.isascii():
                value.encode()
        except UnicodeEncodeError as error:
            raise Wrong(
                value, f"not valid Unicode ({error.reason}): os.fsencode() it into a field of bytes"
            ) from None
        return value
    return expected(_pack_str, value, sending, "str")


def _pack_int(value: Any, sending: Sending) -> Any:
    if type(value) is int:
        if _MIN_INT <= value <= _MAX_INT:
            return value
        raise Wrong(value, "an integer travels from -2**63 to 2**64 - 1")
    return expected(_pack_int, value, sending, "int")


def _pack_float(value: Any, sending: Sending) -> Any:
    if type(value) is float:
        return value
    if type(value) is int and -_EXACT_FLOAT <= value <= _EXACT_FLOAT:  # a float to the type checker, too
        return float(value)
    return expected(_pack_float, value, sending, "float")


def _unpack_float(value: Any, receiving: Receiving) -> Any:
    if type(value) is float:  # msgspec alone would take an integer for one
        return value
    raise DecodeError("an integer where a float is declared")


PLAIN: dict[Any, Node] = {
    bool: _plain(bool),
    bytes: _plain(bytes),
    types.NoneType: _plain(types.NoneType),
    str: Node("str", str, frozenset({str}), _pack_str),
    int: Node("int", int, frozenset({int}), _pack_int, hashed=True),
    float: Node("float", int | float, frozenset({float}), _pack_float, _unpack_float, hashed=True),
}


def enum_node(cls: type[enum.Enum]) -> Node:
    if issubclass(cls, enum.Flag):
        return _flag(cls)
    members = cls.__members__

    def pack(value: Any, sending: Sending) -> Any:
        return value.name if type(value) is cls else expected(pack, value, sending, cls.__name__)

    def unpack(value: Any, receiving: Receiving) -> Any:
        member = members.get(value)
        if member is None:
            raise DecodeError(f"{value!r:.60} is no member of {cls.__name__}")
        return member

    return Node(f"{cls.__name__}{sorted(members)}", str, frozenset({cls}), pack, unpack)


def _flag(cls: type[enum.Flag]) -> Node:
    bits = 0
    for member in cls.__members__.values():
        bits |= member.value
    let_go(cls)
    known = cls._value2member_map_.get

    def pack(value: Any, sending: Sending) -> Any:
        if type(value) is not cls:
            return expected(pack, value, sending, cls.__name__)
        if value.value & ~bits:
            raise Wrong(value, f"it has bits that are no members of {cls.__name__}")
        return value.value

    def unpack(value: Any, receiving: Receiving) -> Any:
        if value & ~bits:
            raise DecodeError(f"{value} has bits that are no members of {cls.__name__}")
        member = known(value)
        if member is None:
            receiving.cost.take(COMBINED)
            member = cls(value)
        return member

    return Node(f"{cls.__name__}[{bits:#x}]", int, frozenset({cls}), pack, unpack, hashed=True)


def literal_node(values: tuple[Any, ...], what: str) -> Node:
    if not all(type(value) in (str, int, bool, types.NoneType) for value in values):
        raise TypeError(f"{what}: literals are strings, integers, True, False and None, not {values!r}")
    allowed = {(type(value), value) for value in values}
    text = f"Literal{sorted(map(repr, values))}"

    def pack(value: Any, sending: Sending) -> Any:
        if type(value) is Moved or (type(value), value) not in allowed:
            return expected(pack, value, sending, f"one of {', '.join(map(repr, values))}")
        return value

    def unpack(value: Any, receiving: Receiving) -> Any:
        if (type(value), value) not in allowed:
            raise DecodeError(f"{value!r:.60} is none of {', '.join(map(repr, values))}")
        return value

    wire = _union_of(*map(type, values))
    return Node(text, wire, frozenset(map(type, values)), pack, unpack)


def descriptor_node(field: Field) -> Node:
    def pack(value: Any, sending: Sending) -> Any:
        lent = value
        if f"{type(value).__module__}.{type(value).__qualname__}" == "tempfile._TemporaryFileWrapper":
            lent = value.file
        if type(lent) in field.accepts:
            try:
                return sending.lend(lent, field, value)
            except Refused as refused:
                raise Wrong(value, refused.reason) from refused
            except OSError as error:  # such as a number that was closed behind the back of its owner
                raise Wrong(value, str(error)) from error
        names = " or ".join(sorted(cls.__name__ for cls in field.accepts))
        return expected(pack, value, sending, names)

    def unpack(value: Any, receiving: Receiving) -> Any:
        return receiving.take(value, field)

    return Node(field.text, int, field.accepts, pack, unpack, hashable=False)


# --- containers --------------------------------------------------------------------------------------------------------


def sequence_node(cls: Any, child: Node, meta: list[Any], what: str) -> Node:
    """A list, a tuple of any length, a set, a frozenset."""
    unique = cls in (set, frozenset)
    if unique and not child.hashable:
        raise TypeError(f"{what}: elements of a {cls.__name__} must be hashable, not {child.text}")
    unpack_child = child.unpack

    def pack(value: Any, sending: Sending) -> Any:
        if type(value) is not cls:
            return expected(pack, value, sending, cls.__name__)
        if unique:
            sending.cost.take(SET + len(value))
            _check_hashed(child, value, sending.cost)
        packed: list[Any] = []
        try:
            for item in value:
                packed.append(child.pack(item, sending))
        except Wrong as wrong:
            wrong.path.append(f"[{len(packed)}]" if not unique else "{...}")
            raise
        return packed

    def unpack(value: Any, receiving: Receiving) -> Any:
        if unique:
            receiving.cost.take(SET + len(value))
        if unpack_child is not None:
            value = [unpack_child(item, receiving) for item in value]
        if not unique:
            return value if cls is list else tuple(value)
        _refuse_hashed(child, value, receiving.cost)
        return _unique(cls, value, len(value))

    wire = bounded(_list_of(child.wire), meta)
    through = cls is list and unpack_child is None
    return Node(
        f"{cls.__name__}[{child.text}]{meta_text(meta)}",
        wire,
        frozenset({cls}),
        pack,
        None if through else unpack,
        hashed=child.hashed,
        made=True,
        hashable=cls in (tuple, frozenset) and child.hashable,
        depth=1 + child.depth,
    )


def _check_hashed(child: Node, values: Any, cost: Cost) -> None:
    objection = cost.objection(values, child.made) if child.hashed else None
    if objection is not None:
        raise Wrong(values, f"{len(values)} keys or elements of {child.text}; {objection}: send a list")


def _refuse_hashed(child: Node, values: list[Any], cost: Cost) -> None:
    objection = cost.objection(values, child.made) if child.hashed else None
    if objection is not None:
        raise DecodeError(f"{len(values)} keys or elements of {child.text}; {objection}")


def _unique(cls: Any, items: Any, count: int) -> Any:
    """Make a set or dict of ``items``.

    Raises:
        DecodeError: one comes twice.
    """
    found = cls(items)
    if len(found) != count:
        raise DecodeError(f"a {cls.__name__} in which a key or an element comes twice")
    return found


def tuple_node(children: list[Node]) -> Node:
    """A tuple of so many members."""

    def pack(value: Any, sending: Sending) -> Any:
        if type(value) is not tuple or len(value) != len(children):
            return expected(pack, value, sending, f"a tuple of {len(children)}")
        packed: list[Any] = []
        try:
            for child, item in zip(children, value, strict=True):
                packed.append(child.pack(item, sending))
        except Wrong as wrong:
            wrong.path.append(f"[{len(packed)}]")
            raise
        return packed

    def unpack(value: Any, receiving: Receiving) -> Any:
        return tuple(
            item if child.unpack is None else child.unpack(item, receiving)
            for child, item in zip(children, value, strict=True)
        )

    return Node(
        f"tuple[{', '.join(child.text for child in children)}]",
        _tuple_of(*(child.wire for child in children)),
        frozenset({tuple}),
        pack,
        unpack if any(child.unpack for child in children) else None,
        hashed=any(child.hashed for child in children),
        made=True,
        hashable=all(child.hashable for child in children),
        depth=1 + max((child.depth for child in children), default=0),
    )


def dict_node(key: Node, value: Node, meta: list[Any], what: str) -> Node:
    if not key.hashable:
        raise TypeError(f"{what}: keys of a dict must be hashable, not {key.text}")

    def pack(obj: Any, sending: Sending) -> Any:
        if type(obj) is not dict:
            return expected(pack, obj, sending, "dict")
        sending.cost.take(DICT)
        _check_hashed(key, obj, sending.cost)
        packed = []
        for k, v in obj.items():
            try:
                packed_key = key.pack(k, sending)
            except Wrong as wrong:
                wrong.path.append(f".keys()[{k!r:.60}]")
                raise
            try:
                packed.append((packed_key, value.pack(v, sending)))
            except Wrong as wrong:
                wrong.path.append(f"[{k!r:.60}]")
                raise
        return packed

    def unpack(items: Any, receiving: Receiving) -> Any:
        receiving.cost.take(DICT)
        unpack_key, unpack_value = key.unpack, value.unpack
        if unpack_key is None and unpack_value is None and not key.made:  # only their number counts
            _refuse_hashed(key, items, receiving.cost)
            return _unique(dict, items, len(items))
        keys, values = [k for k, _ in items], [v for _, v in items]
        if unpack_key is not None:
            keys = [unpack_key(k, receiving) for k in keys]
        _refuse_hashed(key, keys, receiving.cost)
        if unpack_value is not None:
            values = [unpack_value(v, receiving) for v in values]
        return _unique(dict, zip(keys, values, strict=True), len(keys))

    wire = bounded(_list_of(_tuple_of(key.wire, value.wire)), meta)
    text = f"dict[{key.text}, {value.text}]{meta_text(meta)}"
    depth = 2 + max(key.depth, value.depth)
    return Node(text, wire, frozenset({dict}), pack, unpack, hashable=False, depth=depth)


def bounded(wire: Any, meta: list[Any]) -> Any:
    for bound in meta:
        wire = Annotated[wire, bound]
    return wire


def meta_text(meta: list[Any]) -> str:
    return "".join(map(repr, meta))


# --- unions ------------------------------------------------------------------------------------------------------------


def optional_node(inner: Node) -> Node:
    unpack_inner = inner.unpack

    def pack(value: Any, sending: Sending) -> Any:
        return None if value is None else inner.pack(value, sending)

    def unpack(value: Any, receiving: Receiving) -> Any:
        if value is None or unpack_inner is None:
            return value
        return unpack_inner(value, receiving)

    return Node(
        f"{inner.text} | None",
        _union_of(inner.wire, types.NoneType),
        inner.accepts | {types.NoneType},
        pack,
        None if unpack_inner is None else unpack,
        hashed=inner.hashed,
        made=inner.made,
        hashable=inner.hashable,
        depth=inner.depth,
    )


def alternatives_node(nodes: list[Node], what: str) -> Node:
    """Types whose values are told apart by their Python type, and on the wire by their number."""
    nodes = sorted(nodes, key=lambda node: node.text)
    by_type: dict[type, tuple[int, Node]] = {}
    wrappers: dict[type, Node] = {}
    for number, node in enumerate(nodes):
        for cls in node.accepts:
            if cls in by_type:
                raise TypeError(f"{what}: a {cls.__name__} could be more than one of its alternatives")
            by_type[cls] = number, node
        wrapper = msgspec.defstruct(
            f"Alternative{number}",
            [("value", node.wire)],
            tag=number,
            array_like=True,
            forbid_unknown_fields=True,
        )
        wrappers[wrapper] = node
    if float in by_type:
        by_type.setdefault(int, by_type[float])

    def pack(value: Any, sending: Sending) -> Any:
        found = by_type.get(type(value))
        if found is None:
            return expected(pack, value, sending, " or ".join(sorted(cls.__name__ for cls in by_type)))
        number, node = found
        return number, node.pack(value, sending)

    def unpack(value: Any, receiving: Receiving) -> Any:
        node = wrappers[type(value)]
        return value.value if node.unpack is None else node.unpack(value.value, receiving)

    return Node(
        " | ".join(node.text for node in nodes),
        _union_of(*wrappers),
        frozenset(by_type),
        pack,
        unpack,
        hashed=any(node.hashed for node in nodes),
        made=any(node.made for node in nodes),
        hashable=all(node.hashable for node in nodes),
        depth=1 + max(node.depth for node in nodes),
    )


def classes_node(nodes: list[Node]) -> Node:
    """Message classes: told apart by their name."""
    by_type = {cls: node for node in nodes for cls in node.accepts}
    by_wire = {node.wire: node for node in nodes}

    def pack(value: Any, sending: Sending) -> Any:
        node = by_type.get(type(value))
        if node is None:
            return expected(pack, value, sending, " or ".join(sorted(cls.__name__ for cls in by_type)))
        return node.pack(value, sending)

    def unpack(value: Any, receiving: Receiving) -> Any:
        unpack_class = by_wire[type(value)].unpack
        assert unpack_class is not None  # of every class
        return unpack_class(value, receiving)

    text = " | ".join(sorted(node.text for node in nodes))
    wire = _union_of(*(node.wire for node in nodes))
    depth = max(node.depth for node in nodes)
    return Node(text, wire, frozenset(by_type), pack, unpack, hashable=False, depth=depth)
