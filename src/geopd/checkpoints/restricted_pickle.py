"""Pickles read as data: no import, no call but of the functions that an allow-list names.

A pickle is a program for a small stack machine. The standard library decodes its instructions here and this module
carries them out on inert values, so what a pickle can reach is exactly the allow-list it is read with. A global that
the list lacks ends the reading; nothing of the pickle's choosing is imported, looked up or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from geopd.checkpoints.checkpoint import CheckpointError


@dataclass(frozen=True, slots=True)
class PickleLimits:
    """What one pickle may claim: bytes, instructions, nesting, and objects (``objects`` + one in every 8 bytes)."""

    nbytes: int = 1 << 28
    instructions: int = 20_000_000
    nesting: int = 64
    objects: int = 100_000


@dataclass(frozen=True, slots=True)
class Constant:
    """A global that stands for a value rather than for something called, such as ``torch.bfloat16``."""

    value: object


@dataclass(slots=True, eq=False)
class Inert:
    """An object of a class that is never imported: its dotted name, the arguments it was made with and its state.

    Compared and hashed by identity.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True, slots=True)
class Global:
    """A global of the allow-list, as the arguments of another may hold it: its dotted name and what stands for it."""

    name: str
    build: Callable[..., object]


Allow = Mapping[str, Callable[..., object] | Constant]
"""Dotted global (``collections.OrderedDict``) -> what stands for it: a function of the pickled arguments, or a value.
A function's errors of type ValueError, TypeError, KeyError or IndexError mean a malformed pickle."""

_SCALARS = (str, int, float, bytes, type(None))
# a text with an escape that Python does not know is a warning, which whoever runs this may have made an error
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, Warning)


def inert(*names: str) -> dict[str, Callable[..., object]]:
    """Allow-list entries that make an ``Inert`` of each dotted class name."""
    return {name: partial(_inert, name) for name in names}


def _inert(name: str, *args: object) -> Inert:
    return Inert(name, args)


def read_pickle(
    data: bytes,
    source: Path | str,
    allow: Allow,
    persistent: Callable[[Any], object] | None = None,
    limits: PickleLimits | None = None,
) -> Any:
    """The value of the first pickle in ``data``: plain values, lists, tuples, dicts, and what ``allow`` makes.

    ``source`` names the file in errors; ``persistent`` turns a persistent id (torch's storages) into a value.
    Bytes after the pickle are left alone.

    Raises:
        CheckpointError: if it names a global outside the allow-list, uses an instruction that no weights need,
            exceeds a limit, or is malformed.
    """
    limits = limits or PickleLimits()
    if len(data) > limits.nbytes:
        raise CheckpointError(f"{source}: its pickle has {len(data):,} bytes, at most {limits.nbytes:,} are read")
    machine = _Machine(source, allow, persistent, limits, limits.objects + len(data) // 8)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > limits.instructions:
                raise CheckpointError(f"{source}: its pickle has more than {limits.instructions:,} instructions")
            machine.step(opcode.name, argument)
        value = machine.stack.pop()
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise CheckpointError(f"{source}: not a readable pickle ({error}); write or download the file again") from error
    if _nests_deeper(value, limits.nesting):
        raise CheckpointError(
            f"{source}: its pickle nests deeper than {limits.nesting} levels or holds itself; refused"
        )
    return value


def _nests_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        # an object met twice on one level is followed once: shared objects cannot multiply the work
        level = list({id(part): part for holder in level for part in _parts(holder)}.values())
        if not level:
            return False
    return True


def _parts(holder: object) -> Iterable[object]:
    match holder:
        case dict():
            return chain(holder, holder.values())
        case list() | tuple():
            return holder
        case Inert():
            return (*holder.args, holder.state)
    return ()


@dataclass
class _Machine:
    source: Path | str
    allow: Allow
    persistent: Callable[[Any], object] | None
    limits: PickleLimits
    objects_left: int
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _PUT:
            # a dict grows with what is stored, not with the largest index that a pickle names
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[int(argument)])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in _NOTHING:
            raise CheckpointError(f"{self.source}: its pickle uses {name}, which no weights need; refused")

    def push(self, value: Any) -> None:
        """Push a new object, within the limit on their number."""
        self.objects_left -= 1
        if self.objects_left < 0:
            raise CheckpointError(f"{self.source}: its pickle makes more objects than a file of its size can hold")
        self.stack.append(value)

    def pop(self) -> Any:
        """Pop the last item pushed."""
        return self.stack.pop()

    def take(self, n: int) -> list[Any]:
        """Pop n items, the last pushed last."""
        if len(self.stack) < n:
            raise IndexError("its stack is empty")
        items = self.stack[-n:]
        del self.stack[-n:]
        return items

    def mark(self) -> None:
        """Open a group."""
        if len(self.marks) >= 4 * self.limits.nesting:
            raise CheckpointError(f"{self.source}: its pickle nests deeper than {self.limits.nesting} levels; refused")
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """Close a group: what was pushed since it was opened."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        """Append items to the list on top."""
        holder = self.stack[-1]
        if type(holder) is not list:
            raise TypeError(f"appends to {type(holder).__name__}")
        holder.extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values, alternating, in the dict on top."""
        holder = self.stack[-1]
        if type(holder) is not dict:
            raise TypeError(f"sets keys of {type(holder).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            holder[_key(key)] = value

    def make_dict(self) -> None:
        """Push a dict of the group's keys and values."""
        items = self.pop_mark()
        self.push({})
        self.set_items(items)

    def find(self, module: Any, name: Any) -> None:
        """Push what the allow-list has for a global."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global without a name")
        dotted = f"{module}.{name}"
        found = self.allow.get(dotted)
        if found is None:
            raise CheckpointError(
                f"{self.source}: its pickle names {dotted[:200]!r}, which is not among the classes that weights are "
                "made of; refused, nothing was run. Save the weights alone, as safetensors or as a plain state dict"
            )
        self.push(found.value if isinstance(found, Constant) else Global(dotted, found))

    def call(self) -> None:
        """Replace a global and its arguments by what stands for the object they make."""
        made, arguments = self.take(2)
        if not isinstance(made, Global):
            raise TypeError(f"calls {type(made).__name__}")
        if type(arguments) is not tuple:
            raise TypeError(f"calls {made.name} with {type(arguments).__name__}")
        self.push(made.build(*arguments))

    def build(self) -> None:
        """Give an object its state; only inert objects keep it."""
        state, holder = self.stack.pop(), self.stack[-1]
        if isinstance(holder, Inert):
            holder.state = state
        elif type(holder) is not dict:  # the attributes of a state dict, such as _metadata, hold no weights
            raise TypeError(f"gives a state to {type(holder).__name__}")

    def load_persistent(self) -> None:
        """Push what stands for a persistent id."""
        if self.persistent is None:
            raise CheckpointError(f"{self.source}: its pickle refers to storages, and this file has none; refused")
        self.push(self.persistent(self.stack.pop()))


def _key(key: Any) -> Any:
    # hashing a deep tuple would exhaust the C stack
    flat = type(key) is tuple and all(isinstance(part, _SCALARS) for part in key)
    if not (flat or isinstance(key, (*_SCALARS, Inert))):
        raise TypeError(f"a key of type {type(key).__name__}")
    return key


# fmt: off
_PUSH = frozenset({
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
})
# fmt: on
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_NOTHING = frozenset({"PROTO", "FRAME", "STOP"})
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "DICT": lambda m, _: m.make_dict(),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.take(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.take(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.take(3))),
    "APPEND": lambda m, _: m.extend(m.take(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.take(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, text: m.find(*text.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.find(*m.take(2)),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.load_persistent(),
}
