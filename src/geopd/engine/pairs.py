"""Parts about two runs of one origin: how they are named, and which of a folder's are still current.

Their place in the manifest is ``pair_parts[run][other_run][matrix]``, run < other_run. A pair is measured where both
runs are in one call of ``measure``; runs of earlier calls are not read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from geopd.results import digest_of

PairParts = dict[str, dict[str, dict[str, str]]]


def pair_key(one: str, other: str) -> str:
    """Name of the part about two runs, from the names of their own parts of the matrix: all inputs and settings."""
    return digest_of({"pair": [one, other]})


def nested(keys: Mapping[tuple[str, str, str], str]) -> PairParts:
    """The manifest's form of part names by (run, other_run, matrix)."""
    found: PairParts = {}
    for (run, other, matrix), key in keys.items():
        found.setdefault(run, {}).setdefault(other, {})[matrix] = key
    return found


def flat(pairs: PairParts) -> Iterator[tuple[tuple[str, str, str], str]]:
    """Part names of the manifest's form, by (run, other_run, matrix)."""
    for run, others in pairs.items():
        for other, parts in others.items():
            for matrix, key in parts.items():
                yield (run, other, matrix), key


def still_current(pairs: PairParts, parts: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, str, str], str]:
    """Those of a folder's pairs whose two runs are as they were when the pair was measured.

    ``parts``: the runs' part names by label and matrix as they are now. A run that grew or was replaced has other
    names, so what it was compared with before goes.
    """
    return {
        (run, other, matrix): key
        for (run, other, matrix), key in flat(pairs)
        if matrix in parts.get(run, {})
        and matrix in parts.get(other, {})
        and key == pair_key(parts[run][matrix], parts[other][matrix])
    }
