"""The subspace a run moved its weights in, its controls, and the entries it moved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from geopd.checkpoints import Checkpoint, CheckpointError, Run, holds_weights, located, open_checkpoint, open_run
from geopd.matrices import Pair, Pairing, Selection, canonical_view, pair_checkpoints
from geopd.spectral import leading_triples, visibly_changed
from geopd.training.basis import KINDS, MASK, Basis, Provenance, pack_mask

__all__ = ["ORIGIN", "basis_of_run", "haar"]

ORIGIN = "origin"  # the word that stands for: as the run's run.json says
_ETA = 1e-3  # relative change that counts as visible in the bf16 view, as in arXiv 2606.07082
_STILL = "did not move"


def basis_of_run(
    base: str | Path,
    run: str | Path,
    *,
    step: int | None = None,
    k: int = 16,
    kind: str = "update",
    seed: int = 0,
    matrices: Sequence[str] = ("layers",),
    advance: Callable[[int, int], None] | None = None,
) -> Basis:
    """V_K of every selected matrix from dW_t = W_t - W_0 (arXiv 2606.07082, section 5), or a control of its size.

    ``update``: the leading K right singular vectors of dW_t. ``origin``: those of W_0. ``random``: K Haar-distributed
    directions, from the seed and the matrix's name alone. ``mask``: the entries that changed visibly once both ends are
    rounded to bf16. Every kind covers the same matrices, those that moved; the others are left out, with the reason. K
    is cut to the numerical rank of dW_t, beyond which singular vectors mean nothing; in the controls too, which would
    otherwise be larger than what they control for (``origin`` also to the rank of W_0).

    Args:
        base: the checkpoint dW is counted from, or the word ``origin``: as the run's ``run.json`` says.
        run: a checkpoint, or a folder of step-numbered ones.
        step: which of the run's steps; the last by default.
        k: columns of every V.
        kind: as above.
        seed: of a random basis.
        matrices: presets (``layers``, ``attention``, ``all``) or globs over canonical names.
        advance: told (matrices done, matrices in all).

    Raises:
        ValueError: an option is out of range, the run has no such step, nothing selected moved, or an entry is not
            finite. A ``CheckpointError`` where a file cannot be read or the origin is not the one recorded.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind {kind}: use one of {', '.join(KINDS)}")
    if k < 1:
        raise ValueError(f"--k {k}: a subspace has one column or more")
    opened = open_run(run)
    at, tuned = _checkpoint(opened, step)
    origin = opened.origin_path() if str(base) == ORIGIN else _lone(base)
    before = canonical_view(open_checkpoint(origin))
    origin_digest = _digest_of(before, opened if str(base) == ORIGIN else None)
    after = canonical_view(open_checkpoint(tuned, origin))
    pairing = pair_checkpoints(before, after)
    chosen, left_out = _selected(pairing, Selection(tuple(matrices)), before.path, after.path)
    tensors: dict[str, Tensor] = {}
    energy: dict[str, float] = {}
    for done, pair in enumerate(chosen, 1):
        found = _of_matrix(pair, before, after, kind, k, seed)
        if isinstance(found, str):
            left_out[pair.weight.name] = found
        else:
            tensors[pair.weight.name], energy[pair.weight.name] = found
        if advance is not None:
            advance(done, len(chosen))
    if not tensors:
        raise ValueError(f"{tuned}: none of the {len(chosen)} matrices moved from {before.path}; name a later step")
    provenance = Provenance(
        kind=kind,
        k=None if kind == MASK else k,
        step=at,
        origin=str(origin),
        origin_digest=origin_digest,
        tuned=str(tuned),
        tuned_digest=after.digest(),
        matrices=tuple(matrices),
        seed=seed if kind == "random" else None,
        left_out=dict(sorted(left_out.items())),
        energy=energy,
        widths={pair.weight.name: pair.shape[1] for pair in chosen if pair.weight.name in tensors and kind == MASK},
        tool=version("geopd"),
    )
    return Basis({}, provenance, tensors) if kind == MASK else Basis(tensors, provenance)


def haar(n: int, k: int, seed: int, name: str) -> Float64[Tensor, "n k"]:
    """K orthonormal columns in R^n, uniform (Haar) over the Stiefel manifold; the same for the same seed and name.

    The Q of a Gaussian matrix's QR with a positive diagonal of R, without which Q is not uniform.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    Q, R = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))
    signs: Tensor = Q * torch.where(torch.diagonal(R) < 0, -1.0, 1.0)
    return signs


def _checkpoint(run: Run, step: int | None) -> tuple[int | None, Path]:
    if step is None:
        return run.checkpoints[-1]
    found = dict(run.checkpoints)
    if step not in found:
        steps = ", ".join(str(s) for s in found if s is not None) or "none with a number"
        raise ValueError(f"--step {step}: {run.path} has no such step; it has {steps}")
    return step, found[step]


def _digest_of(origin: Checkpoint, run: Run | None) -> str:
    """The origin's digest, held against the one that the run's ``run.json`` records where it was found there."""
    digest = origin.digest()
    recorded = run and run.manifest and run.manifest.origin and run.manifest.origin.digest
    if recorded not in (None, digest):
        raise CheckpointError(
            f"{origin.path}: not the checkpoint that {run and run.path} started from: its digest is {digest}, "
            f"run.json says {recorded}; restore it, or name the base yourself"
        )
    return digest


def _lone(base: str | Path) -> Path:
    path = located(base).absolute()
    if path.is_file() or holds_weights(path):
        return path
    inside = open_run(path)
    if len(inside.checkpoints) > 1:
        names = ", ".join(folder.name for _, folder in inside.checkpoints)
        raise CheckpointError(f"{path}: a base is one checkpoint, and this folder holds {names}; name one of them")
    return inside.checkpoints[0][1]


def _selected(pairing: Pairing, selection: Selection, before: Path, after: Path) -> tuple[list[Pair], dict[str, str]]:
    left_out: dict[str, str] = {}
    for skip in pairing.skipped:
        if skip.weight is not None and not selection.full(skip.weight):
            continue
        if skip.failed:
            raise CheckpointError(f"{skip.name}: {skip.reason}")
        if skip.weight is not None:
            left_out[skip.name] = skip.reason
    chosen = [pair for pair in pairing.matched.values() if selection.full(pair.weight)]
    if not chosen:
        raise ValueError(
            f"--matrices {' '.join(selection.patterns)}: selects none of the {len(pairing.matched)} tensors that "
            f"{after} shares with {before}"
        )
    return chosen, left_out


def _of_matrix(
    pair: Pair, before: Checkpoint, after: Checkpoint, kind: str, k: int, seed: int
) -> tuple[Tensor, float] | str:
    """The matrix's part of the basis with its share of the update's energy, or why there is none."""
    W0, W = before.read(pair.origin_tensor), after.read(pair.tuned_tensor)
    D = W.double() - W0.double()
    if not bool(torch.isfinite(D).all()):
        raise ValueError(f"{after.path}: tensor {pair.tuned_tensor}: not finite against {before.path}; repair the run")
    total = float((D * D).sum())
    if total == 0.0:
        return _STILL
    if kind == MASK:
        mask = visibly_changed(W0, W, _ETA, bf16=True)
        if not bool(mask.any()):
            return "no entry changed visibly in bf16"
        return pack_mask(mask), float((D[mask] ** 2).sum()) / total
    V = _directions(W0, D, kind, k, seed, pair.weight.name)
    return V.float(), float(((D @ V) ** 2).sum()) / total


def _directions(W0: Tensor, D: Tensor, kind: str, k: int, seed: int, name: str) -> Float64[Tensor, "n k"]:
    moved = leading_triples(D, k)
    columns = min(k, moved.rank)
    if kind == "random":
        return haar(D.shape[1], columns, seed, name)
    found = moved if kind == "update" else leading_triples(W0.double(), columns)
    return found.right[:, : min(columns, found.rank)]
