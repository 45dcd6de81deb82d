"""Folding finished shards into one results folder, bit for bit what an unsharded measurement writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopd.engine.folder import held, manifest_of
from geopd.engine.folding import fold
from geopd.engine.pairs import flat
from geopd.engine.part_names import checkpoint_digest_of, replaced_parts
from geopd.engine.shards import FinishedShard, bring_part, find_shards, require_one_whole
from geopd.results import Store
from geopd.results.task_log import append_line, read_log


@dataclass(frozen=True, slots=True)
class MergeOutcome:
    """What a call of ``merge`` folded: how many shards and matrices of runs, what failed, and what is worth telling."""

    out: Path
    shards: int
    matrices: int
    failed: dict[str, dict[str, str]]
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 done, 1 some matrices failed."""
        return 1 if any(self.failed.values()) else 0


def merge(out: str | Path, shards: Sequence[str | Path] = ()) -> MergeOutcome:
    """Fold all shards of one measurement into ``out``; the inputs are not read again.

    ``shards``: folders given as ``--out`` to sharded calls, or shards themselves; none for those under ``out``. The
    same ``out`` accumulates: what was measured or merged into it before stays.

    Raises:
        ValueError: if the shards are not exactly those of one measurement, one is unfinished or damaged, or ``out``
            holds other settings or a label with other inputs.
    """
    out = Path(out)
    found = find_shards([Path(folder) for folder in shards] or [out])
    require_one_whole(found)
    first = found[0]
    with held(out):
        before = manifest_of(out)
        settings = dict(first.manifest["settings"])
        for name, value in (before or {"settings": {}})["settings"].items():
            if settings.get(name) != value:
                raise ValueError(
                    f"{out}: was measured with {name} = {value}, the shards with {settings.get(name)}; name another OUT"
                )
        entries = _entries(found)
        stale = replaced_parts(out, before, entries, replace=False)
        store = Store(out)
        parts: dict[str, dict[str, str]] = {label: {} for label in entries}
        pairs: dict[tuple[str, str, str], str] = {}
        for shard in found:
            for label, keys in shard.manifest["parts"].items():
                parts[label] |= keys
            pairs |= dict(flat(shard.manifest["pair_parts"]))
            keys = {key for run in shard.manifest["parts"].values() for key in run.values()}
            for key in sorted(keys | {key for _, key in flat(shard.manifest["pair_parts"])}):
                bring_part(key, shard.folder, out)
        _merge_logs(out, found)
        parts = {label: dict(sorted(keys.items())) for label, keys in parts.items()}
        device = "+".join(sorted({str(shard.manifest["device"]) for shard in found}))
        with store.folding():
            covered = dict(first.record["coverage"])
            gone = fold(store, settings, covered, before, entries, parts, dict(sorted(pairs.items())), None, device)
            store.discard((gone | stale) - {key for run in parts.values() for key in run.values()})
        failed = {
            label: {item["matrix"]: item["reason"] for item in covered[label]["failed"]}
            | {name: reason for name, key in keys.items() if (reason := store.record(key)["failure"])}
            for label, keys in parts.items()
        }
    return MergeOutcome(out, len(found), sum(map(len, parts.values())), failed, _notes(found))


def _entries(found: Sequence[FinishedShard]) -> dict[str, dict[str, Any]]:
    """The runs' inputs with the digests of whole checkpoints, put together from what each shard read of them.

    Raises:
        ValueError: if nobody read some tensor.
    """
    digests = {
        (Path(path), tensor): digest
        for shard in found
        for path, tensors in shard.record["digests"].items()
        for tensor, digest in tensors.items()
    }
    first = found[0]
    if len(digests) != first.record["tensors"]:
        raise ValueError(
            f"the shards read {len(digests)} of {first.record['tensors']} tensors: measure them with one version"
        )
    entries = {}
    for label, entry in first.manifest["inputs"].items():
        steps = [checkpoint_digest_of(Path(path), digests) for path in first.record["checkpoints"][label]]
        origin = checkpoint_digest_of(Path(entry["origin"]), digests)
        entries[label] = entry | {"origin_digest": origin, "digests": steps}
    return entries


def _merge_logs(out: Path, found: Sequence[FinishedShard]) -> None:
    known = {json.dumps(line, sort_keys=True) for line in read_log(out)}
    lines = [line for shard in found for line in read_log(shard.folder)]
    for line in sorted(lines, key=lambda line: str(line.get("time"))):
        if json.dumps(line, sort_keys=True) not in known:
            append_line(out, line)


def _notes(found: Sequence[FinishedShard]) -> tuple[str, ...]:
    kinds = {tuple(shard.record["machine"]) for shard in found}
    if len(kinds) == 1:
        return ()
    return (
        f"the shards were measured on {len(kinds)} kinds of machine or library versions: values agree within their "
        "errors, not bit for bit",
    )
