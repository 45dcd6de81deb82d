"""Pairing an origin with a later checkpoint: what can be compared, and for everything else the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

from geopd.checkpoints import Checkpoint, CheckpointError, TensorInfo
from geopd.matrices.canonical import CanonicalCheckpoint, canonical_view
from geopd.matrices.mismatch import no_common_names
from geopd.matrices.naming import Role, WeightName, canonical_names

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of both checkpoints: its canonical identity, shape, and its name and dtype on either side.

    The names are those of ``canonical_view``: the ones on disk, but for tensors that are cut out of others.
    """

    weight: WeightName
    shape: tuple[int, ...]
    origin_tensor: str
    tuned_tensor: str
    origin_dtype: str
    tuned_dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Skip:
    """A tensor that is not compared, and why.

    ``failed`` marks what should have been comparable and is damaged; where one side still tells its shape, ``pair``
    says what it would have been, so that the tables can say that it failed.
    """

    name: str
    reason: str
    weight: WeightName | None = None
    failed: bool = False
    pair: Pair | None = None


@dataclass(frozen=True, slots=True)
class Pairing:
    """Everything two checkpoints hold: matched, skipped with reasons, and facts worth a warning."""

    matched: dict[str, Pair]
    skipped: tuple[Skip, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    checkpoint: CanonicalCheckpoint
    weights: dict[str, tuple[str, WeightName]]
    unreadable: dict[str, tuple[str, str]]
    refused: dict[str, tuple[WeightName, str]]
    ties: bool

    @classmethod
    def of(cls, checkpoint: CanonicalCheckpoint) -> _Side:
        names = canonical_names({name: info.shape for name, info in checkpoint.tensors.items()})
        # an unreadable tensor has no shape; as a matrix of unknown shape its canonical name is still the right one
        lost = canonical_names(dict.fromkeys(checkpoint.unreadable, (1, 1)))
        refused = canonical_names(dict.fromkeys(checkpoint.refused, (1, 1)))
        return cls(
            checkpoint,
            {weight.name: (name, weight) for name, weight in names.items()},
            {weight.name: (name, checkpoint.unreadable[name]) for name, weight in lost.items()},
            {weight.name: (weight, checkpoint.refused[name]) for name, weight in refused.items()},
            bool(checkpoint.config.get("tie_word_embeddings", False)),
        )

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.tensors[self.weights[name][0]]

    @property
    def names(self) -> set[str]:
        """Canonical names of everything it holds, readable or not."""
        return {*self.weights, *self.unreadable, *self.refused}

    def is_tied_head(self, name: str) -> bool:
        return self.ties and name not in self.weights and name.rsplit(".", 1)[-1] in ("lm_head", "embed_out", "output")


def pair_checkpoints(origin: Checkpoint, tuned: Checkpoint, *, per_head: bool = False) -> Pairing:
    """Pair two checkpoints by canonical name, whatever the layout of either.

    Matched are float tensors of one shape on both sides. Missing, damaged, quantised, differently shaped (a resized
    vocabulary is named as such), non-float and more-than-2-D tensors are skipped, each with its reason; so is a head
    that on both sides has the embedding's content. Checkpoints of one content match everywhere: nothing changed is a
    result. ``per_head``: as in ``canonical_view``.

    Raises:
        CheckpointError: no name is on both sides; says what either is named like and what may be the reason.
    """
    before, after = (_Side.of(canonical_view(side, per_head=per_head)) for side in (origin, tuned))
    if before.names and after.names and not before.names & after.names:
        raise CheckpointError(no_common_names(before.checkpoint, after.checkpoint))
    matched: dict[str, Pair] = {}
    skipped: list[Skip] = []
    for name in sorted(before.names | after.names):
        outcome = _pair(name, before, after)
        if isinstance(outcome, Pair):
            matched[name] = outcome
        else:
            skipped.append(outcome)
    return Pairing(matched, tuple(skipped), _warnings(before, after, matched))


def _pair(name: str, before: _Side, after: _Side) -> Pair | Skip:
    if name in before.unreadable or name in after.unreadable:
        return _damaged(name, before, after)
    if name in before.refused or name in after.refused:
        side = before if name in before.refused else after
        weight, reason = side.refused[name]
        return Skip(name, f"{side.checkpoint.path}: {reason}", weight)
    if name not in before.weights or name not in after.weights:
        lacking, having = (before, after) if name not in before.weights else (after, before)
        reason = f"missing in {lacking.checkpoint.path}"
        if lacking.is_tied_head(name):
            reason += ": tied to the embedding there (tie_word_embeddings)"
        return Skip(name, reason, having.weights[name][1])
    (origin_name, weight), (tuned_name, _) = before.weights[name], after.weights[name]
    old, new = before.info(name), after.info(name)
    if old.shape != new.shape:
        return Skip(name, _shape_reason(weight, old.shape, new.shape), weight)
    if strange := sorted({old.dtype, new.dtype} - _FLOATS):
        return Skip(name, f"not a float weight: stored as {', '.join(strange)}", weight)
    if weight.role is Role.UNSUPPORTED:
        dims = "x".join(map(str, old.shape)) or "scalar"
        return Skip(name, f"not a matrix or vector: its shape is {dims}", weight)
    if weight.module == "head" and before.checkpoint.head_is_embedding and after.checkpoint.head_is_embedding:
        return Skip(name, "stored with the embedding's content on both sides: tied, counted once", weight)
    return Pair(weight, old.shape, origin_name, tuned_name, old.dtype, new.dtype, old.nbytes + new.nbytes)


def _damaged(name: str, before: _Side, after: _Side) -> Skip:
    broken, other = (before, after) if name in before.unreadable else (after, before)
    lost, reason = broken.unreadable[name]
    if name not in other.weights:
        return Skip(name, reason, failed=True)
    kept, weight = other.weights[name]
    info = other.info(name)
    names = (lost, kept) if broken is before else (kept, lost)
    return Skip(name, reason, weight, True, Pair(weight, info.shape, *names, info.dtype, info.dtype, 0))


def _shape_reason(weight: WeightName, old: tuple[int, ...], new: tuple[int, ...]) -> str:
    if weight.role is Role.EMBEDDING and len(old) == len(new) == 2 and old[1] == new[1]:
        return f"vocabulary resized from {old[0]} to {new[0]} rows: not compared"
    return f"shapes differ: {'x'.join(map(str, old))} against {'x'.join(map(str, new))}"


def _warnings(before: _Side, after: _Side, matched: dict[str, Pair]) -> tuple[str, ...]:
    found = [*before.checkpoint.warnings, *after.checkpoint.warnings]
    found += [
        f"{side.checkpoint.path}: head tied to the embedding (tie_word_embeddings): counted once"
        for side in (before, after)
        if side.ties and not any(weight.module == "head" for _, weight in side.weights.values())
    ]
    mixed: dict[tuple[str, str], int] = {}
    for pair in matched.values():
        if pair.origin_dtype != pair.tuned_dtype:
            key = (pair.origin_dtype, pair.tuned_dtype)
            mixed[key] = mixed.get(key, 0) + 1
    found += [
        f"{n} tensors are {old} at the origin and {new} in {after.checkpoint.path}: "
        "spectra and norms of the update include the rounding between the two"
        for (old, new), n in sorted(mixed.items())
    ]
    return tuple(found)
