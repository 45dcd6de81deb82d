"""What a call measures, as names: the digests of its inputs, and from them the name of every part it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geopd.checkpoints import CheckpointError, combine_digests
from geopd.engine.inputs import opened
from geopd.engine.options import MeasureOptions
from geopd.engine.pairs import pair_key
from geopd.engine.plan import Digests, Plan
from geopd.engine.run_plan import RunPlan
from geopd.results import digest_of

NUMERICS = 4  # part of every part's name: raise it when the same inputs should give other numbers


def checkpoint_digest_of(path: Path, digests: Digests) -> str | None:
    """Digest of what was selected of a checkpoint, all of it by default; None where a tensor could not be read."""
    tensors = {name: value for (where, name), value in digests.items() if where == path}
    known = {name: value for name, value in tensors.items() if value is not None}
    return combine_digests(known) if len(known) == len(tensors) else None


def verify_origins(plan: Plan, digests: Digests) -> None:
    """Refuse an origin that is not the one a run's ``run.json`` records; of a selection the rest is read for it.

    Raises:
        CheckpointError: naming the origin, the run and both digests.
    """
    whole: dict[Path, str | None] = {}
    for run in plan.runs:
        recorded = run.run.manifest.origin if run.run.manifest else None
        if recorded is None or recorded.digest is None:
            continue
        if run.origin not in whole:
            checkpoint = opened(run.origin)
            # the recorded digest is of the tensors as they are stored
            every = checkpoint.source is checkpoint.stored.source and all(
                (run.origin, name) in digests for name in checkpoint.tensors
            )
            whole[run.origin] = checkpoint_digest_of(run.origin, digests) if every else checkpoint.digest()
        if recorded.digest != whole[run.origin]:
            raise CheckpointError(
                f"{run.origin}: not the checkpoint that {run.run.label} started from: its digest is "
                f"{whole[run.origin]}, run.json says {recorded.digest}; restore it, or name the base yourself"
            )


def run_entry(run: RunPlan, digests: Digests) -> dict[str, Any]:
    """A run's inputs as the manifest records them."""
    origin = checkpoint_digest_of(run.origin, digests)
    manifest = run.run.manifest
    return {
        "path": str(run.run.path),
        "origin": str(run.origin),
        "origin_digest": origin,
        "steps": run.steps,
        "digests": [checkpoint_digest_of(path, digests) for _, path in run.run.checkpoints],
        "paradigm": run.paradigm,
        "seed": manifest.seed if manifest else None,
        "tags": manifest.tags if manifest else {},
        "run_settings": manifest.settings if manifest else {},
        "evaluations": list(run.run.evaluations),
    }


def part_key(run: RunPlan, name: str, digests: Digests, options: MeasureOptions, first_steps: int | None = None) -> str:
    """Name of the part of a run's matrix: of all its steps, or of as many first ones."""
    paths = dict(run.run.checkpoints)
    steps = dict(list(run.pairs[name].items())[:first_steps])
    first = next(iter(steps.values()))
    relevant = {key: value for key, value in options.as_settings().items() if key != "matrices"}
    if not options.per_head:  # the names of matrices measured whole are older than the option
        del relevant["per_head"]
    return digest_of(
        {
            "numerics": NUMERICS,
            "run": run.run.label,
            "matrix": name,
            "full": options.selection.full(first.weight),
            "origin": digests.get((run.origin, first.origin_tensor)),
            "steps": [[step, digests.get((paths[step], pair.tuned_tensor))] for step, pair in steps.items()],
            "settings": relevant,
        }
    )


def pair_keys(plan: Plan, keys: Mapping[tuple[str, str], str]) -> dict[tuple[str, str, str], str]:
    """Part names of the runs two by two, by (run, other run, matrix)."""
    if not plan.options.pair_diagnostics:
        return {}
    found = {}
    for one, other in plan.run_pairs():
        run, second = one.run.label, other.run.label
        for name in one.pairs.keys() & other.pairs.keys():
            found[run, second, name] = pair_key(keys[run, name], keys[second, name])
    return dict(sorted(found.items()))


def replaced_parts(
    out: Path, before: dict[str, Any] | None, entries: Mapping[str, dict[str, Any]], *, replace: bool
) -> set[str]:
    """Parts that the folder has of this call's labels.

    Raises:
        ValueError: if a label's inputs are others than the folder's and it is not to be replaced.
    """
    stale: set[str] = set()
    for label, entry in entries.items():
        old = before["inputs"].get(label) if before else None
        if before is None or old is None:
            continue
        now = dict(zip(entry["steps"], entry["digests"], strict=True))
        known = [(old["origin_digest"], entry["origin_digest"])]
        known += [(digest, now.get(step, "gone")) for step, digest in zip(old["steps"], old["digests"], strict=True)]
        # no digest: it was damaged then, so a repaired one is welcome
        if any(was not in (None, digest) for was, digest in known) and not replace:
            raise ValueError(
                f"{out}: already holds a run labelled {label} with other inputs ({old['path']} from {old['origin']}); "
                "give this one another label, or --replace that one"
            )
        stale |= set(before["parts"][label].values())
    return stale
