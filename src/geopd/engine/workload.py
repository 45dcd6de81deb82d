"""What a task is: one matrix, where it lies at its origin and at every step, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geopd.diagnostics import Diagnostic, PairDiagnostic
from geopd.engine.decomposition_cache import DecompositionCache
from geopd.engine.inputs import Stamp
from geopd.engine.options import MeasureOptions
from geopd.matrices import WeightName
from geopd.results import Identity


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor on disk.

    ``stamp``: its checkpoint's files as they were when the command began, None to read whatever lies there.
    ``readable``: whether its content could be digested then. ``nbytes``: its size. ``base``: of an adapter.
    ``per_head``: whether attention matrices are cut into heads.
    """

    checkpoint: Path
    tensor: str
    stamp: Stamp | None = None
    readable: bool = False
    nbytes: int = 0
    base: Path | None = None
    per_head: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """An older part of a run's matrix, of its first ``steps`` checkpoints: what it says of them stays."""

    key: str
    steps: int


@dataclass(frozen=True, slots=True)
class RunSteps:
    """One run's side of a task: where the matrix lies at each step, and the name of the part it becomes.

    With ``kept`` the part holds only what the older part does not say (``geopd.engine.extending``).
    """

    run: str
    key: str
    steps: tuple[tuple[int | None, Location], ...]
    kept: Kept | None = None


@dataclass(frozen=True, slots=True)
class RunEnds:
    """Two runs whose last checkpoints are compared (run < other), and the name of the part it becomes."""

    run: str
    other: str
    key: str
    step: int | None
    last: Location
    other_last: Location


@dataclass(frozen=True, slots=True)
class Task:
    """One canonical matrix, where its origin lies, the runs that it is compared with, and the pairs of runs."""

    weight: WeightName
    shape: tuple[int, ...]
    origin: Location
    runs: tuple[RunSteps, ...]
    options: MeasureOptions
    full: bool
    pairs: tuple[RunEnds, ...] = ()
    cache: DecompositionCache | None = None
    """Where W0's decomposition is kept; no value depends on it."""

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """What is asked of this matrix: embeddings, heads and vectors are entrywise only, unless asked."""
        return tuple(d for d in self.options.diagnostics if self.full or d.group == "entrywise")

    @property
    def pair_diagnostics(self) -> tuple[PairDiagnostic, ...]:
        """What is asked of two runs, by the same rule."""
        return tuple(d for d in self.options.pair_diagnostics if self.full or d.group == "entrywise")

    @property
    def nbytes(self) -> int:
        """Bytes of all its inputs, each once."""
        ends = [location for pair in self.pairs for location in (pair.last, pair.other_last)]
        steps = [location for run in self.runs for _, location in run.steps]
        return sum(location.nbytes for location in {self.origin, *steps, *ends})

    def identity(self, run: str, step: int | None, other: str | None = None) -> Identity:
        """The identity columns of this matrix's rows."""
        rows, cols = as_matrix_shape(self.shape)
        return Identity(run, step, self.weight.name, self.weight.layer, self.weight.module, rows, cols, other)


def as_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A vector counts as one column."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)
