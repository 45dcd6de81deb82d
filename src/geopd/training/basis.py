"""The file that says where training may move: a subspace or a set of entries for every weight matrix.

One safetensors file. For a subspace it holds, under each matrix's canonical name, V of shape (n, K), float32, with
orthonormal columns: the weight is W (m, n), and an update D lies in the channel iff D = D V V^T. For a coordinate mask
it holds the mask's bits packed by row, (m, ceil(n / 8)), uint8, most significant bit first. Provenance is JSON in the
file's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "KINDS",
    "MASK",
    "Basis",
    "Provenance",
    "check_destination",
    "pack_mask",
    "read_basis",
    "unpack_mask",
    "write_basis",
]

MASK = "mask"
KINDS = ("update", "random", "origin", MASK)
_ENTRY = "geopd_basis"
_VERSION = 1
_ORTHONORMAL = 1e-4  # largest |V^T V - I| accepted: float32 storage leaves 1e-7, bf16 storage 1e-3


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a basis was made from.

    Args:
        kind: ``update`` (leading right singular vectors of dW), ``origin`` (of W0), ``random`` (Haar) or ``mask``.
        k: columns asked for; a matrix whose update has a lower rank holds fewer, in every kind. None for a mask.
        step: optimiser step of the checkpoint; None where it carries none.
        origin: path of the checkpoint dW is counted from.
        origin_digest: its content digest.
        tuned: path of the checkpoint after training.
        tuned_digest: its content digest.
        matrices: the patterns that selected the matrices.
        seed: of a random basis, else None.
        left_out: selected matrices that the file does not hold, with the reason.
        energy: share of ||dW||_F^2 inside the subspace or the mask, by matrix.
        widths: n of every packed mask, whose last byte of a row may be padded.
        tool: version of geopd.
    """

    kind: str
    k: int | None
    step: int | None
    origin: str
    origin_digest: str
    tuned: str
    tuned_digest: str
    matrices: tuple[str, ...]
    seed: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    tool: str = ""


@dataclass(frozen=True)
class Basis:
    """Subspaces by canonical matrix name (``vectors``), or coordinate masks (``masks``, packed): one of them is empty.

    Args:
        vectors: V of shape (n, K), float32, orthonormal columns; K may differ between matrices.
        provenance: what it was made from.
        masks: bits packed by row, (m, ceil(n / 8)).
    """

    vectors: dict[str, Float32[Tensor, "n k"]]
    provenance: Provenance
    masks: dict[str, UInt8[Tensor, "m b"]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the matrices it holds."""
        return tuple(self.vectors or self.masks)

    @property
    def is_mask(self) -> bool:
        """Whether it holds coordinate masks instead of subspaces."""
        return self.provenance.kind == MASK

    def mask(self, name: str) -> Bool[Tensor, "m n"]:
        """The entries of a matrix that may move."""
        return unpack_mask(self.masks[name], self.provenance.widths[name])

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape is the one the basis was made for."""
        if self.is_mask:
            return shape == (self.masks[name].shape[0], self.provenance.widths[name])
        return len(shape) == 2 and shape[1] == self.vectors[name].shape[0]


def pack_mask(mask: Bool[Tensor, "m n"]) -> UInt8[Tensor, "m b"]:
    """Eight entries a byte, row by row, most significant bit first; the last byte of a row is padded with zeros."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def unpack_mask(packed: UInt8[Tensor, "m b"], width: int) -> Bool[Tensor, "m n"]:
    """The mask of ``width`` columns behind ``pack_mask``."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=1, count=width)).bool()


def check_destination(path: str | Path) -> None:
    """Require that a file can be written at a path, whose missing folders are made on writing. Changes nothing.

    Raises:
        ValueError: a folder lies there, or where its folder should be there is a file, or it is not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name the file to write in it, such as {path / 'basis.safetensors'}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{path}: {above} is a file, and no folder can be made there; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: {above} is not writable; name another place")


def write_basis(path: str | Path, basis: Basis) -> Path:
    """Write a basis file atomically and return its path.

    Raises:
        ValueError: the basis is empty, ``read_basis`` would refuse it, or the file cannot be written.
    """
    path = Path(path)
    check_destination(path)
    tensors = {name: tensor.contiguous() for name, tensor in (basis.masks or basis.vectors).items()}
    _check(path, basis.provenance, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    entry = json.dumps({"version": _VERSION, **asdict(basis.provenance)}, sort_keys=True, allow_nan=False)
    try:
        save_file(tensors, partial, metadata={"format": "pt", _ENTRY: entry})
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be written ({error}); make room, or name another place") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_basis(path: str | Path) -> Basis:
    """The basis in a file of ``geopd basis``.

    Raises:
        ValueError: the file is absent, no basis, of another version, or holds a V that is not orthonormal.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such basis file; make one with `geopd basis BASE RUN --out {path}`")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); make it again with `geopd basis`") from error
    provenance = _provenance(path, metadata)
    _check(path, provenance, tensors)
    return Basis({}, provenance, tensors) if provenance.kind == MASK else Basis(tensors, provenance)


def _provenance(path: Path, metadata: Mapping[str, str]) -> Provenance:
    if _ENTRY not in metadata:
        raise ValueError(f"{path}: safetensors, but not a basis; make one with `geopd basis BASE RUN --out {path}`")
    try:
        entry = json.loads(metadata[_ENTRY])
        version = entry.pop("version")
        if version != _VERSION:
            raise ValueError(f"version {version}, and this geopd reads {_VERSION}")
        return Provenance(**(entry | {"matrices": tuple(entry["matrices"])}))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its provenance cannot be read ({error}); make it again with `geopd basis`"
        ) from error


def _check(path: Path, provenance: Provenance, tensors: Mapping[str, Tensor]) -> None:
    if provenance.kind not in KINDS:
        raise ValueError(f"{path}: kind {provenance.kind!r} is none of {', '.join(KINDS)}; make the basis again")
    if not tensors:
        raise ValueError(f"{path}: holds no matrix; make the basis from a run that moved some")
    for name, tensor in tensors.items():
        reason = _mask_fault(tensor, provenance.widths.get(name)) if provenance.kind == MASK else _fault(tensor)
        if reason:
            raise ValueError(f"{path}: {name}: {reason}; make the basis again with `geopd basis`")


def _mask_fault(packed: Tensor, width: int | None) -> str | None:
    if width is None or packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-width // 8):
        return f"{packed.dtype} of shape {tuple(packed.shape)} is no packed mask of {width} columns"
    return None


def _fault(V: Tensor) -> str | None:
    if V.dtype != torch.float32 or V.ndim != 2 or not 0 < V.shape[1] <= V.shape[0]:
        return f"{V.dtype} of shape {tuple(V.shape)}, where V is float32 (n, K) with K from 1 to n"
    off = float((V.T @ V - torch.eye(V.shape[1])).abs().max())
    if not off <= _ORTHONORMAL:  # NaN fails too
        return f"columns are not orthonormal (V^T V differs from the identity by {off:.1e})"
    return None
