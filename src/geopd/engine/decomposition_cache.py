"""W0's decomposition on disk: shared by runs and invocations, bounded in size, the least recently used leave first.

An entry is one safetensors file named by everything that decides its bits: the tensor's content (dtype, shape, bytes),
how many vectors are asked for, the version of the numerics, threads, device, libraries and processor. So what comes out
is bit for bit what would have been computed here. It is written by rename and carries a checksum: what is damaged is
told, and computed anew. Reading takes no lock; who writes holds the folder, so that the bound holds too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from threadpoolctl import threadpool_info
from torch import Tensor

from geopd.diagnostics import OriginMatrix
from geopd.results import digest_of, write_atomically
from geopd.spectral import Decomposition

DEFAULT_LIMIT = 20 << 30  # bytes: an 8B model's decompositions at k = 512 take 11 GB
SMALLEST = 256  # min(m, n) from which an entry saves on its first use what writing it took (docs/cluster.md)
_RESERVE = 1 << 30  # bytes left free on the disk: results need room too
_ABANDONED = 3600.0  # seconds after which a half-written file has no writer any more
_CLOCK_SLACK = 60.0  # seconds by which the clocks of two machines may differ
_SUFFIX = ".decomposition.safetensors"  # no name that a model's file has: clearing a folder spares the rest
_FORMAT = 1
_TENSORS = ("sigma", "left", "right", "sigma_error")
_logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/geopd/decompositions``, by default under ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "geopd" / "decompositions"


@dataclass(frozen=True, slots=True)
class CacheContents:
    """What a cache folder holds: entries, their bytes, and when the first and last of them were used (Unix seconds)."""

    entries: int
    bytes: int
    oldest_use: float | None
    newest_use: float | None


@dataclass(frozen=True, slots=True)
class DecompositionCache:
    """The decompositions kept under ``root``, at most ``limit`` bytes of them.

    ``numerics``: version of the numbers that the code computes. ``since`` (Unix seconds): what was used after it is not
    evicted for something new, so that a measurement larger than the limit keeps its first and costliest matrices
    instead of pushing out every one before it is read again.
    """

    root: Path
    limit: int = DEFAULT_LIMIT
    numerics: int = 0
    since: float = float("inf")

    @contextmanager
    def lent(self, origin: OriginMatrix) -> Iterator[None]:
        """Give ``origin`` what is kept of it; what it computes inside the block is kept, unless the block fails."""
        if origin.p < SMALLEST:
            yield
            return
        names = self._names(origin)
        kept = {kind for kind, name in names.items() if self._lend(origin, kind, self.root / name)}
        yield
        for kind in names.keys() - kept & origin.__dict__.keys():
            self._keep(self.root / names[kind], _to_entry(getattr(origin, kind)))

    def _names(self, origin: OriginMatrix) -> dict[str, str]:
        k = max(origin.rotation_k, origin.principal_rank) if origin.vectors else 0
        common = {
            "format": _FORMAT,
            "content": _content_digest(origin.stored),
            "numerics": self.numerics,
            "threads": torch.get_num_threads(),
            "device": _device(origin.stored.device),
            "machine": machine(),
        }
        return {
            "decomposition": f"{digest_of(common | {'vectors': k})}{_SUFFIX}",
            "exact_sigma": f"{digest_of(common | {'vectors': 'none, without squaring'})}{_SUFFIX}",
        }

    def _lend(self, origin: OriginMatrix, kind: str, path: Path) -> bool:
        try:
            found = _from_entry(path)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _logger.warning("%s: damaged cache entry (%s); computed anew", path, error)
            return False
        with suppress(OSError):  # a folder that is only read keeps no order of use
            os.utime(path)
        device = origin.stored.device
        if isinstance(found, Decomposition):
            moved = {name: getattr(found, name).to(device) for name in _TENSORS}
            origin.__dict__[kind] = Decomposition(**{**found.__dict__, **moved})
        else:
            origin.__dict__[kind] = (found[0].to(device), found[1])
        return True

    def _keep(self, path: Path, entry: tuple[dict[str, Tensor], dict[str, str]]) -> None:
        tensors, metadata = entry
        size = sum(tensor.nbytes for tensor in tensors.values()) + 4096
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if self._make_room(size):
                    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
        except (OSError, SafetensorError) as error:
            _logger.warning("%s: not kept in the cache (%s); the measurement goes on without", path, error)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.root, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems have no locks: then the bound is kept less strictly
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _make_room(self, size: int) -> bool:
        """Whether an entry of this size fits now, after the least recently used ones left."""
        self._sweep()
        entries = sorted(self._entries(), key=lambda entry: entry[1])
        total = sum(entry[2] for entry in entries)
        free = shutil.disk_usage(self.root).free - _RESERVE
        excess = max(total + size - self.limit, size - free)
        leaving, gained = [], 0
        for path, used, held in entries:
            if gained >= excess or used >= self.since:
                break
            leaving.append(path)
            gained += held
        if gained < excess:
            return False
        for path in leaving:
            path.unlink(missing_ok=True)
        return True

    def _sweep(self) -> None:
        for path in self.root.glob(f".*{_SUFFIX}.*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    def _entries(self) -> list[tuple[Path, float, int]]:
        """Path, time of last use and bytes of every entry."""
        found, latest = [], time.time() + _CLOCK_SLACK
        with suppress(FileNotFoundError), os.scandir(self.root) as files:
            for file in files:
                if file.name.endswith(_SUFFIX) and not file.name.startswith("."):
                    with suppress(FileNotFoundError):  # another process evicted it
                        status = file.stat()
                        # used in the future: the clock went back since, and nothing may stay for ever
                        used = status.st_mtime if status.st_mtime <= latest else 0.0
                        found.append((Path(file.path), used, status.st_size))
        return found

    def contents(self) -> CacheContents:
        """What the folder holds now; nothing where there is none."""
        entries = self._entries()
        uses = [used for _, used, _ in entries]
        return CacheContents(
            len(entries), sum(size for *_, size in entries), min(uses, default=None), max(uses, default=None)
        )

    def clear(self) -> CacheContents:
        """Remove every entry and every half-written one; says what was there."""
        found = self.contents()
        for path in [*(path for path, *_ in self._entries()), *self.root.glob(f".*{_SUFFIX}.*.tmp")]:
            path.unlink(missing_ok=True)
        return found


def _content_digest(tensor: Tensor) -> str:
    held = tensor.detach().cpu().contiguous()
    state = hashlib.blake2b(f"{held.dtype}{tuple(held.shape)}".encode(), digest_size=16)
    state.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=1)
def machine() -> list[str]:
    """What decides the bits of a float64 kernel beside its input: libraries, their kernels' kind, the processor."""
    libraries = [f"{name} {version(name)}" for name in ("torch", "numpy", "scipy")]
    found = {
        f"{info['internal_api']} {info.get('version')} {info.get('architecture')}"
        for info in threadpool_info()
        if info["user_api"] == "blas"
    }
    return [*libraries, *sorted(found), torch.backends.cpu.get_cpu_capability(), _processor()]


def _processor() -> str:
    with suppress(OSError, StopIteration), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{platform.machine()} {platform.processor()}"


def _to_entry(value: Decomposition | tuple[Tensor, float]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, with a checksum over both."""
    scalars: dict[str, Any]
    if isinstance(value, Decomposition):
        held = {name: getattr(value, name) for name in _TENSORS}
        scalars = {key: item for key, item in value.__dict__.items() if key not in _TENSORS}
        # of a zero matrix it is sigma itself, and a file names no tensor twice
        held["sigma_error"] = held["sigma_error"].clone()
    else:
        held, scalars = {"sigma": value[0]}, {"error": value[1]}
    # kernels may sum in another order over columns than over rows: what was laid out by column comes back so
    by_column = [name for name, tensor in held.items() if not tensor.is_contiguous()]
    tensors = {name: (t.T if name in by_column else t).contiguous().cpu() for name, t in held.items()}
    text = json.dumps({"scalars": scalars, "by_column": by_column}, sort_keys=True)
    return tensors, {"entry": text, "checksum": _checksum(tensors, text)}


def _from_entry(path: Path) -> Decomposition | tuple[Tensor, float]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        # copies: aligned as torch's own tensors are, and out of reach of whoever writes to the file
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    if metadata["checksum"] != _checksum(tensors, metadata["entry"]):
        raise ValueError("its checksum does not match")
    entry = json.loads(metadata["entry"])
    held = {name: tensor.T if name in entry["by_column"] else tensor for name, tensor in tensors.items()}
    if "error" in entry["scalars"]:
        return held["sigma"], float(entry["scalars"]["error"])
    return Decomposition(**held, **entry["scalars"])


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    state = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        state.update(f"{name}{_content_digest(tensors[name])}".encode())
    return state.hexdigest()
