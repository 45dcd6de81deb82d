"""Damage that knows what it damages: JSON trees, safetensors headers, pickle programs, zip directories, plain bytes."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]

# fmt: off
_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64, 10**40,
    0.5, -0.0, 1e308, float("inf"), float("nan"),
)
_TEXTS = (
    "", ".", "..", "../x", "/etc/passwd", "a/../../b", "model.safetensors", "x" * 300, "\0", "\ud800", "é", "%s", "{}",
    "F32", "BF16", "F8_E4M3", "F4", "I64", "U8", "__metadata__", "lora_A.weight", "weight_map", "1e9", "*", "(",
)
# fmt: on
_EMPTY: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": {}})
_INTEGERS = (0, 1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Bits flipped, bytes set, cut, repeated, inserted, or fields of 2, 4 and 8 bytes set to edge values."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(out) + 1)
        kind = random.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
        elif kind == 2:
            del out[at : at + random.choice((1, 2, 8, 64, 1 << 20))]
        elif kind == 3:
            out[at:at] = out[at : at + random.choice((1, 4, 32, 256))]
        elif kind == 4:
            out[at:at] = random.randbytes(random.choice((1, 2, 8, 64)))
        elif kind == 5:
            size, code = random.choice(((2, "<H"), (4, "<I"), (8, "<Q")))
            if at + size <= len(out):
                out[at : at + size] = struct.pack(code, random.choice(_INTEGERS) % (1 << 8 * size - 1))
        else:
            other = random.randrange(len(out) + 1)
            out[at : at + 16] = out[other : other + 16]
    return bytes(out)


def mutate_json(random: Random, data: bytes) -> bytes:
    """A JSON document with values, keys or whole branches replaced, or its text damaged."""
    if random.random() < 0.15:
        return mutate_bytes(random, data)
    tree = json.loads(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        tree = _mutated(random, tree)
    text = json.dumps(tree)
    if random.random() < 0.05:
        text = _deep(random) if random.random() < 0.5 else text.replace("{", '{"a":1,"a":2,', 1)
    return text.encode("utf-8", "surrogatepass")


def _deep(random: Random) -> str:
    depth = random.choice((10, 100, 1000, 5000, 100_000))
    opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + ("0" + closing * depth if random.random() < 0.5 else "")


def _value(random: Random) -> Any:
    return random.choice(random.choice((_NUMBERS, _TEXTS, _EMPTY)))


def _mutated(random: Random, tree: Any) -> Any:
    """A tree with one node changed: the one a random walk from the root ends at."""
    if isinstance(tree, dict) and tree and random.random() < 0.9:
        key = random.choice(list(tree))
        kind = random.randrange(10)
        changed = dict(tree)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[random.choice(_TEXTS)] = changed.pop(key)
        elif kind == 2:
            changed[random.choice(_TEXTS)] = _value(random)
        elif kind == 3:
            changed[key] = tree[random.choice(list(tree))]
        else:
            changed[key] = _mutated(random, tree[key])
        return changed
    if isinstance(tree, list) and tree and random.random() < 0.9:
        items = list(tree)
        at = random.randrange(len(items))
        kind = random.randrange(4)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items.insert(at, _value(random))
        elif kind == 2 and all(type(item) is int for item in items):
            items[at] += random.choice((-1, 1, 8, -8))
        else:
            items[at] = _mutated(random, items[at])
        return items
    return _value(random)


def mutate_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with its header's JSON changed, under a right or wrong length, over a right or wrong body."""
    if random.random() < 0.1:
        return mutate_bytes(random, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if random.random() < 0.9:
        header = mutate_json(random, header)
    if random.random() < 0.15:
        body = random.choice((body[:-1], body + b"\0", b"", body * 2))
    length = len(header) if random.random() < 0.9 else random.choice((0, 1, len(header) + 1, 2**40, 2**60, 2**63))
    return struct.pack("<Q", length) + header + body


def _long(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(raw)) + raw


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


# fmt: off
_GLOBALS = (
    "os system", "builtins eval", "builtins exec", "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage", "torch BFloat16Storage", "torch Size", "torch.storage UntypedStorage", "torch float32",
    "torch.distributed.checkpoint.metadata Metadata", "torch.distributed.checkpoint.metadata TensorProperties",
    "torch.distributed.checkpoint.metadata MetadataIndex", "torch.serialization _get_layout", "argparse Namespace",
    "numpy.core.multiarray _reconstruct", "torch._utils _rebuild_parameter", "subprocess Popen", "pathlib PosixPath",
)
_SNIPPETS = (
    *(f"c{name.replace(' ', chr(10), 1)}\n".encode() for name in _GLOBALS),
    *(b"J" + struct.pack("<i", n) for n in (-1, 0, 1, 2**31 - 1)),
    *(_long(n) for n in (2**33, 2**60, 2**63, -(2**63), 2**4000)),
    *(_text(text) for text in _TEXTS),
    *(b"G" + struct.pack(">d", x) for x in (0.0, float("nan"), float("inf"))),
    b"(", b")", b"]", b"}", b"N", b"\x88", b"\x89", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"0", b"1", b"2",
    b"R", b"\x81", b"b", b"a", b"e", b"s", b"u", b"Q", b"\x93", b"\x94", b".", b"\x8f", b"\x90", b"\x91", b"\x92",
    b"(" * 200, b"]\x85" * 100, b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"p99999999999\n",
    b"\x82\x01", b"\x84\xff\xff\xff\x7f", b"\x97", b"\x98", b"\x96" + struct.pack("<Q", 2**40), b"B\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f", b"\x8d" + struct.pack("<Q", 2**62), b"\x8e" + struct.pack("<Q", 2**40), b"ios\nsystem\n",
    b"I" + b"9" * 5000 + b"\n", b"L" + b"7" * 5000 + b"L\n", b"F1e999\n", b"S'x'\n", b"Pstorage\n", b"\x80\x05",
)
# fmt: on


def mutate_pickle(random: Random, data: bytes) -> bytes:
    """A pickle with instructions dropped, doubled, swapped, moved or replaced, values shared, or damaged as bytes."""
    if random.random() < 0.1:
        return mutate_bytes(random, data)
    starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    program = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(program))
        kind = random.randrange(9)
        if kind == 0 and len(program) > 1:
            del program[at]
        elif kind == 1:
            program.insert(at, program[at])
        elif kind == 2:
            other = random.randrange(len(program))
            program[at], program[other] = program[other], program[at]
        elif kind == 3:
            program[at] = program[random.randrange(len(program))]
        elif kind == 4:
            program.insert(at, random.choice(_SNIPPETS))
        elif kind == 5:
            end = at + random.choice((1, 2, 8))
            program[at:at] = program[at:end] * random.choice((1, 2, 30))
        elif kind == 8:  # what is on top becomes a pair of itself, again and again
            program.insert(at, b"2\x86" * random.choice((2, 20, 40, 58)))
        else:
            program[at] = random.choice(_SNIPPETS)
    return b"".join(program)


def mutate_zip(random: Random, data: bytes) -> bytes:
    """A zip with its pickle, another entry, an entry's name or compression, or its directory's fields changed."""
    if random.random() < 0.3:
        return _mutate_directory(random, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    if random.random() < 0.8:
        entries = [(name, mutate_pickle(random, raw) if name.endswith(".pkl") else raw) for name, raw in entries]
    else:
        at = random.randrange(len(entries))
        name, raw = entries[at]
        kind = random.randrange(5)
        if kind == 0:
            del entries[at]
        elif kind == 1:
            entries[at] = (random.choice((*(text for text in _TEXTS if text), "archive/code/x.py")), raw)
        elif kind == 2:
            entries[at] = (name, mutate_bytes(random, raw))
        elif kind == 3:
            entries.insert(at, (name + "x", raw))
        else:
            entries[at] = (name, bytes(len(raw) + random.choice((1, 1000, 100_000))))
    compression = zipfile.ZIP_DEFLATED if random.random() < 0.05 else zipfile.ZIP_STORED
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, raw in entries:
            # a name alone would be given the time of day
            entry = zipfile.ZipInfo(name.encode("utf-8", "replace").decode().replace("\0", "0"))
            archive.writestr(entry, raw, compression)
    return made.getvalue()


def _mutate_directory(random: Random, data: bytes) -> bytes:
    """One field of a local header, a directory entry or the directory's end set to an edge value."""
    out = bytearray(data)
    marks = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")
    places = [at for mark in marks for at in _all_places(data, mark)]
    if not places or random.random() < 0.3:
        return mutate_bytes(random, data)
    for _ in range(random.choice((1, 1, 2))):
        at = random.choice(places) + random.randrange(4, 46)
        size, code = random.choice(((2, "<H"), (4, "<I")))
        if at + size <= len(out):
            out[at : at + size] = struct.pack(code, random.choice(_INTEGERS) % (1 << 8 * size))
    return bytes(out)


def _all_places(data: bytes, mark: bytes) -> list[int]:
    found, at = [], data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + 1)
    return found


BY_ENDING: tuple[tuple[str, Mutator], ...] = (
    (".safetensors", mutate_safetensors),
    (".json", mutate_json),
    (".metadata", mutate_pickle),
    (".bin", mutate_zip),
    (".pt", mutate_zip),
    (".pkl", mutate_pickle),
)
"""How a file is damaged, by the end of its name; any other file as bytes."""


def mutate_folder(random: Random, files: dict[str, bytes], kept: frozenset[str] = frozenset()) -> dict[str, bytes]:
    """The files of a checkpoint with one or two of them damaged, or one missing; those of ``kept`` as they are."""
    changed = dict(files)
    for _ in range(random.choice((1, 1, 1, 2))):
        left = [name for name in changed if name not in kept]
        if not left:
            break
        name = random.choice(left)
        if random.random() < 0.01 and len(changed) > 1:
            del changed[name]
        elif changed[name]:
            mutator = next((found for ending, found in BY_ENDING if name.endswith(ending)), mutate_bytes)
            # a second mutation finds the file as the first left it, perhaps past all understanding
            whole = changed[name] == files[name]
            changed[name] = mutator(random, changed[name]) if whole else mutate_bytes(random, changed[name])
    return changed
