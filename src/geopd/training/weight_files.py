"""Weight files that cannot be read or written, in one line that names the file."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

__all__ = ["check_whole", "damaged_file", "writing"]

_PICKLED = (".pt", ".pth", ".bin")
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "unexpected pos")  # what torch.save says on a full disk


def damaged_file(folder: Path) -> tuple[Path, str] | None:
    """The first file of a folder that was cut short, with the reason; None where all are whole.

    Headers are read, not weights: safetensors compares its header with the file's size, and the directory of a file
    of ``torch.save`` is at its end.
    """
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in _PICKLED and not zipfile.is_zipfile(file):
                return file, "the end of the file is missing"
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
        except (SafetensorError, OSError, ValueError) as error:
            return file, " ".join(str(error).split())
    return None


def check_whole(point: Path) -> None:
    """Require that every file of a resume point is whole.

    Raises:
        ValueError: one is not.
    """
    if (found := damaged_file(point)) is not None:
        file, reason = found
        raise ValueError(f"{file} is damaged ({reason}): remove {point} to train from the start again")


@contextmanager
def writing(partial: Path, what: Path) -> Iterator[None]:
    """Turn any failure to write into one line, and remove what was half written.

    Args:
        partial: the folder being written.
        what: its name, for the message.

    Raises:
        OSError: writing failed; safetensors and torch say so with exceptions of their own.
    """
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in _TORCH_WRITES):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{what} cannot be written ({reason}): make room on its disk; the same command then goes on from the last "
            "resume point"
        ) from error
