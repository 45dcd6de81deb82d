"""Pickles read as data: no import, no call but of the functions that an allow-list names.

A pickle is a program for a small stack machine. The standard library decodes its instructions here and this module
carries them out on inert values, so what a pickle can reach is exactly the allow-list it is read with. A global that
the list lacks ends the reading; nothing of the pickle's choosing is imported, looked up or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geopd.checkpoints.checkpoint import CheckpointError
from geopd.checkpoints.pickled_values import Allow, Constant, Global, Inert, nests_deeper, plain_key, written_out


@dataclass(frozen=True, slots=True)
class PickleLimits:
    """What one pickle may claim: bytes, instructions, nesting, and objects (``objects`` + one in every 8 bytes).

    Texts are counted with the objects; as many may be remembered in the memo. Shared objects may make the value written
    out ``objects`` + 8 times as large as the program.
    """

    nbytes: int = 1 << 28
    instructions: int = 20_000_000
    nesting: int = 64
    objects: int = 100_000


# a text with an escape that Python does not know is a warning, which whoever runs this may have made an error
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, Warning)


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
    count = 0
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
    if nests_deeper(value, limits.nesting):
        raise CheckpointError(
            f"{source}: its pickle nests deeper than {limits.nesting} levels or holds itself; refused"
        )
    if written_out(value) > limits.objects + 8 * count:
        raise CheckpointError(
            f"{source}: its pickle shares objects inside one another until they stand for far more than the file "
            "holds; refused"
        )
    return value


@dataclass
class _Machine:
    source: Path | str
    allow: Allow
    persistent: Callable[[Any], object] | None
    limits: PickleLimits
    objects: int
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    made: int = 0

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _TEXTS:
            self.push(argument)
        elif name in _NUMBERS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _PUT:
            # a dict grows with what is stored, not with the largest index that a pickle names
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
            if len(self.memo) > self.objects:
                raise CheckpointError(f"{self.source}: its pickle remembers more objects than a file of its size holds")
        elif name in _GET:
            self.stack.append(self.memo[int(argument)])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in _NOTHING:
            raise CheckpointError(f"{self.source}: its pickle uses {name}, which no weights need; refused")

    def push(self, value: Any) -> None:
        """Push a new object or text, within the limit on their number."""
        self.made += 1
        if self.made > self.objects:
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
            holder[plain_key(key)] = value

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


# fmt: off
_NUMBERS = frozenset({"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"})
_TEXTS = frozenset({
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
