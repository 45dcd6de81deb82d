"""A measurement spread by hand or by a batch scheduler: shards that measure their share each, and what folds them.

Every shard plans the whole measurement, so all agree on who measures what without a word between them. A shard is a
results folder of its own matrices, with a ``shard.json`` beside its manifest that says what it is a part of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geopd.engine.cost import task_cost
from geopd.engine.decomposition_cache import machine
from geopd.engine.part_names import NUMERICS
from geopd.engine.plan import Digests, Plan
from geopd.engine.workload import Location, Task
from geopd.results import write_json
from geopd.results.store import PARTS, VECTORS

RECORD = "shard.json"
FOLDER = "shards"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """The ``number``-th (from 1) of ``of`` shards."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from ``i/n``.

        Raises:
            ValueError: if it is not of that form, or not 1 <= i <= n.
        """
        number, slash, of = text.partition("/")
        with suppress(ValueError):
            if slash and 1 <= int(number) <= int(of):
                return cls(int(number), int(of))
        raise ValueError(f"--shard {text}: give i/n with 1 <= i <= n, such as 1/8 for the first of eight")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def folder(self, out: Path) -> Path:
        """The results folder of this shard under ``--out``, so that all shards can be given the same one."""
        return out / FOLDER / f"{self.number}-of-{self.of}"

    def share_of(self, plan: Plan) -> Plan:
        """The plan of this shard's matrices alone: shares are disjoint, complete, and even in cost.

        The costliest matrix goes to the shard that has least so far: a function of the plan alone.
        """
        tasks = plan.all_tasks()
        shares = _even_shares(tasks, self.of)
        mine = shares[self.number - 1]
        items = {(run.run, task.weight.name) for task in mine for run in task.runs}
        # what belongs to no matrix that is measured is read too, for the checkpoints' digests
        read = {(place.checkpoint, place.tensor) for task in tasks for place in _places(task)}
        rest = sorted(plan.tensors().keys() - read)[self.number - 1 :: self.of]
        own = {(place.checkpoint, place.tensor) for task in mine for place in _places(task)}
        runs = []
        for run in plan.runs:
            others = {name for name in run.pairs if (run.run.label, name) not in items}
            kept = {name: steps for name, steps in run.pairs.items() if name not in others}
            failed = {name: reason for name, reason in run.failed.items() if name not in others}
            runs.append(replace(run, pairs=kept, failed=failed))
        return replace(plan, runs=tuple(runs), share=frozenset(own.union(rest)))


def _even_shares(tasks: Sequence[Task], shares: int) -> list[list[Task]]:
    found: list[list[Task]] = [[] for _ in range(shares)]
    costs = [0.0] * shares
    for task in tasks:  # they come longest first
        lightest = min(range(shares), key=lambda i: (costs[i], len(found[i]), i))
        found[lightest].append(task)
        costs[lightest] += task_cost(task)
    return found


def _places(task: Task) -> Iterable[Location]:
    return (task.origin, *(place for run in task.runs for _, place in run.steps))


def forget_shard(folder: Path) -> None:
    """What is measured again is not finished until it is done."""
    (folder / RECORD).unlink(missing_ok=True)


def record_shard(folder: Path, shard: Shard, whole: Plan, digests: Digests) -> None:
    """Say of a finished shard what it is a part of: ``whole``, and the content of the tensors that it read."""
    read: dict[str, dict[str, str | None]] = {}
    for (path, tensor), digest in digests.items():
        read.setdefault(str(path), {})[tensor] = digest
    record = {
        "schema_version": SCHEMA_VERSION,
        "shard": shard.number,
        "of": shard.of,
        "numerics": NUMERICS,
        "machine": machine(),
        "files": {str(path): [list(item) for item in stamp] for path, stamp in sorted(whole.stamps.items())},
        "checkpoints": {run.run.label: [str(path) for _, path in run.run.checkpoints] for run in whole.runs},
        "coverage": {run.run.label: run.coverage() for run in whole.runs},
        "matrices": {run.run.label: len(run.pairs) for run in whole.runs},
        "tensors": len(whole.tensors()),
        "digests": read,
    }
    write_json(folder / RECORD, record)


@dataclass(frozen=True)
class FinishedShard:
    """A shard's folder with its manifest and its record."""

    folder: Path
    manifest: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def shard(self) -> Shard:
        """Which one it is."""
        return Shard(self.record["shard"], self.record["of"])

    @property
    def items(self) -> set[tuple[str, str]]:
        """The (run, matrix) it measured."""
        return {(label, name) for label, parts in self.manifest["parts"].items() for name in parts}


def find_shards(folders: Sequence[Path]) -> list[FinishedShard]:
    """The shards in folders that were given as ``--out``, or are shards themselves, in order of their number.

    Raises:
        ValueError: if one holds none, or holds one that is not finished or not readable.
    """
    found: dict[Path, FinishedShard] = {}
    for folder in folders:
        inside = [folder] if (folder / RECORD).is_file() else sorted((folder / FOLDER).glob("*-of-*"))
        if not inside:
            raise ValueError(f"{folder}: holds no shard; name what `geopd measure --shard` was given as --out")
        for path in inside:
            found[path.resolve()] = _read(path)
    return sorted(found.values(), key=lambda shard: (shard.shard.of, shard.shard.number, str(shard.folder)))


def _read(folder: Path) -> FinishedShard:
    values = []
    for name in (RECORD, "manifest.json"):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder}: this shard is not finished (no {name}); run its command again")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable ({error}); run the shard's command again") from error
        values.append(value)
    if (version := values[0].get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(f"{folder / RECORD}: schema_version {version!r}, this version reads {SCHEMA_VERSION}")
    return FinishedShard(folder, values[1], values[0])


def require_one_whole(shards: Sequence[FinishedShard]) -> None:
    """Refuse shards that are not all parts of one measurement, or not all of its parts.

    Raises:
        ValueError: naming the folders that do not fit and what differs, or the shards that are missing.
    """
    first = shards[0]
    for other in shards[1:]:
        _require_alike(first, other)
    numbers: dict[int, FinishedShard] = {}
    owners: dict[tuple[str, str], FinishedShard] = {}
    for shard in shards:
        if twin := numbers.get(shard.shard.number):
            raise ValueError(f"{twin.folder} and {shard.folder} are both shard {shard.shard}: leave one out")
        numbers[shard.shard.number] = shard
        for label, name in sorted(shard.items & owners.keys()):
            raise ValueError(f"{name} of {label} is in both {owners[label, name].folder} and {shard.folder}")
        owners |= dict.fromkeys(shard.items, shard)
    if missing := [str(Shard(i, first.shard.of)) for i in range(1, first.shard.of + 1) if i not in numbers]:
        raise ValueError(
            f"shard {', '.join(missing)} missing: run the same `geopd measure` with --shard {missing[0]}, or name its "
            "folder too"
        )
    for label, count in first.record["matrices"].items():
        if (held := sum(owner == label for owner, _ in owners)) != count:
            raise ValueError(f"the shards hold {held} of {count} matrices of {label}: measure them with one version")


def _require_alike(one: FinishedShard, other: FinishedShard) -> None:
    where = f"{one.folder} and {other.folder}"
    if one.shard.of != other.shard.of:
        raise ValueError(f"{where}: one of {one.shard.of} shards and one of {other.shard.of}; name those of one spread")
    if one.record["numerics"] != other.record["numerics"]:
        raise ValueError(f"{where}: measured by versions of geopd whose numbers differ; measure again with one")
    here, there = one.manifest["settings"], other.manifest["settings"]
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(f"{where}: other settings: {name} = {here.get(name)} and {there.get(name)}")
    inputs, others = one.manifest["inputs"], other.manifest["inputs"]
    if inputs.keys() != others.keys():
        raise ValueError(f"{where}: other inputs: runs {', '.join(sorted(inputs))} and {', '.join(sorted(others))}")
    for label, entry in inputs.items():
        for name in sorted(entry.keys() - {"origin_digest", "digests"}):
            if entry[name] != others[label].get(name):
                raise ValueError(
                    f"{where}: other inputs: {name} of {label}: {entry[name]} and {others[label].get(name)}"
                )
    for path, files in one.record["files"].items():
        if files != other.record["files"].get(path):
            raise ValueError(
                f"{where}: other inputs: the files of {path} differ in size or time; measure again what changed "
                "(copies of one checkpoint need its times too: rsync -a, cp -p)"
            )
    for path, tensors in one.record["digests"].items():
        theirs = other.record["digests"].get(path, {})
        if changed := [name for name in tensors if name in theirs and tensors[name] != theirs[name]]:
            raise ValueError(f"{where}: other inputs: {path}: tensor {changed[0]} changed between them; measure again")


def bring_part(key: str, source: Path, target: Path) -> None:
    """Have a finished part and its vectors in another store: linked where that is possible, else copied.

    Raises:
        ValueError: if the part is not there.
    """
    for folder, suffix in ((VECTORS, ".npz"), (PARTS, ".parquet")):  # the rows last: they make the part visible
        name = f"{key}{suffix}"
        here, there = source / folder / name, target / folder / name
        if there.exists() or (folder == VECTORS and not here.exists()):
            continue
        temporary = there.with_name(f".{name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            try:
                temporary.hardlink_to(here)
            except FileNotFoundError:
                raise
            except OSError:  # another file system
                shutil.copyfile(here, temporary)
            temporary.replace(there)
        except FileNotFoundError as error:
            raise ValueError(f"{source}: part {name} is gone; run the shard's command again") from error
