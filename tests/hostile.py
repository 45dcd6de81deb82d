"""Hostile pickles, each of which makes a file when it is run, and the checkpoints they are put into."""

from __future__ import annotations

import io
import os
import pickle
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopd.checkpoints import CheckpointError, open_checkpoint


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def _touch(marker: Path) -> str:
    return f"touch {marker}"


class Touches:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


class MakesAFile:
    def __new__(cls, marker: str) -> MakesAFile:
        Path(marker).touch()
        return super().__new__(cls)


def _evaluated(marker: Path) -> bytes:
    return _call("builtins", "eval", _text(f"__import__('pathlib').Path({str(marker)!r}).touch()"))


PROGRAMS: dict[str, Callable[[Path], bytes]] = {
    "GLOBAL and REDUCE": lambda m: _call("os", "system", _text(_touch(m))),
    "builtins.eval": _evaluated,
    "STACK_GLOBAL": lambda m: _text("os") + _text("system") + b"\x93(" + _text(_touch(m)) + b"tR",
    "INST": lambda m: b"(" + _text(_touch(m)) + b"ios\nsystem\n",
    "OBJ": lambda m: b"(cos\nsystem\n" + _text(_touch(m)) + b"o",
    "posix": lambda m: _call("posix", "system", _text(_touch(m))),
    "subprocess": lambda m: _call("subprocess", "check_call", b"(" + _text("touch") + _text(str(m)) + b"l"),
    "open": lambda m: _call("io", "open", _text(str(m)), _text("w")),
    "partial over os.system": lambda m: _call("functools", "partial", b"cos\nsystem\n", _text(_touch(m))) + b")R",
    "NEWOBJ": lambda m: b"chostile\nMakesAFile\n(" + _text(str(m)) + b"t\x81",
    "NEWOBJ_EX": lambda m: b"chostile\nMakesAFile\n(" + _text(str(m)) + b"t}\x92",
    "inside a state dict": lambda m: b"}" + _text("weight") + _call("os", "system", _text(_touch(m))) + b"s",
    "thrown away at once": lambda m: _call("os", "system", _text(_touch(m))) + b"0}",
    "as a persistent id": lambda m: _call("os", "system", _text(_touch(m))) + b"Q",
}
"""Programs without their header and end, by what they use."""


def pickle_of(name: str, marker: Path) -> bytes:
    """A whole pickle of one program."""
    return b"\x80\x02" + PROGRAMS[name](marker) + b"."


def object_pickle(marker: Path) -> bytes:
    """What ``pickle.dumps`` makes of an object with a hostile ``__reduce__``."""
    return pickle.dumps(Touches(marker), protocol=4)


def torch_zip(program: bytes, extra: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as ``torch.save`` lays it out, with any pickle and more entries."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", compression) as archive:
        for name, data in {"data.pkl": program, "byteorder": b"little", "version": b"3\n", **(extra or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return held.getvalue()


def rewritten(file: Path, change: Callable[[dict[str, bytes]], object], compression: int = zipfile.ZIP_STORED) -> Path:
    """The zip with its entries changed in place by a function of name -> bytes (names without the root folder)."""
    with zipfile.ZipFile(file) as old:
        root = old.namelist()[0].split("/")[0]
        entries = {name.removeprefix(f"{root}/"): old.read(name) for name in old.namelist()}
    change(entries)
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in entries.items():
            new.writestr(f"{root}/{name}", content)
    return file


def poisoned(file: Path, canary: Path) -> Path:
    """A saved state dict whose pickle also holds an object that creates ``canary`` when unpickled."""
    torch.save({"weight": torch.ones(2, 2)}, file)
    attack = pickle.dumps({"weight": Touches(canary)}, protocol=2)
    return rewritten(file, lambda entries: entries.update({"data.pkl": attack}))


def distributed(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A torch distributed checkpoint of one process."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(weights), checkpoint_id=folder, no_dist=True)
    return folder


def rewrite_metadata(folder: Path, change: Callable[[object], object]) -> None:
    """Unpickle a checkpoint's own ``.metadata``, change it, and pickle it again."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def told_within(seconds: int, path: Path) -> str:
    """What a ``CheckpointError`` says when a path is opened and read, "" where it is read.

    It is done in a process that the system ends when the time is over, for no handler runs while a tuple is hashed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        os.write(writing, _told(path).encode("utf-8", "backslashreplace")[:4096])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"{path}: ended with {status} (14: not done in {seconds} s)"
    return said


def _told(path: Path) -> str:
    try:
        checkpoint = open_checkpoint(path)
        for name in (*checkpoint.unreadable, *checkpoint.tensors):
            checkpoint.read(name)
    except CheckpointError as error:
        return str(error)
    except BaseException as error:
        return f"not a CheckpointError: {error!r}"
    return ""


def tiny() -> dict[str, Tensor]:
    """Two small tensors."""
    return {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4), "model.norm.weight": torch.ones(4)}
