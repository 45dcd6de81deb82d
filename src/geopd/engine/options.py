"""What a measurement is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from geopd.diagnostics import Diagnostic, PairDiagnostic, Parameters, Rank, select, select_pairs
from geopd.matrices import Selection

SWEPT_ALPHAS = (0.05, 0.1, 0.3, 0.5)
SWEPT_HILL_K = (8, 16, 32, 64)


@dataclass(frozen=True)
class MeasureOptions:
    """Parameters of ``measure``; of a tuple the first is the headline.

    ``rotation_k``, ``principal_rank``: an integer, or ``p/8`` for a share of each matrix's p = min(m, n), at least 2.
    ``matrices``: presets (layers, attention, all) or globs over canonical names. ``metrics``: metric or group names
    (entrywise, update, full). ``nulls``: draws of the Gaussian and the permuted null, each the price of a checkpoint; 0
    keeps to closed forms. ``per_head``: attention matrices head by head, not whole (rows of q, k, v, columns of o).

    Raises:
        ValueError: on first use, if an option is out of range; the text names it.
    """

    rotation_k: int | str = 512
    principal_rank: int | str = 64
    alpha: tuple[float, ...] = (0.5, 0.3)
    eta: float = 1e-3
    similarity_k: tuple[int, ...] = (16,)
    hill_k: tuple[int, ...] = (16,)
    matrices: tuple[str, ...] = ("layers",)
    metrics: tuple[str, ...] = ("full",)
    nulls: int = 0
    per_head: bool = False

    def with_sweeps(self) -> MeasureOptions:
        """The same with alpha in {0.05, 0.1, 0.3, 0.5} and Hill k in {8, 16, 32, 64} beside what is asked."""
        return replace(
            self,
            alpha=(*self.alpha, *(alpha for alpha in SWEPT_ALPHAS if alpha not in self.alpha)),
            hill_k=(*self.hill_k, *(k for k in SWEPT_HILL_K if k not in self.hill_k)),
        )

    @cached_property
    def parameters(self) -> Parameters:
        """The parameters as the diagnostics read them."""
        return Parameters(
            _rank("--rotation-k", self.rotation_k),
            _rank("--principal-rank", self.principal_rank),
            tuple(self.alpha),
            self.eta,
            tuple(self.similarity_k),
            tuple(self.hill_k),
        )

    def __post_init__(self) -> None:
        if self.nulls < 0:
            raise ValueError(f"--nulls: a number of draws, not {self.nulls}")

    @cached_property
    def selection(self) -> Selection:
        """Which matrices are asked for."""
        return Selection(tuple(self.matrices))

    @cached_property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Which diagnostics are asked for."""
        return select(self.metrics)

    @cached_property
    def pair_diagnostics(self) -> tuple[PairDiagnostic, ...]:
        """Which diagnostics of two runs are asked for."""
        return select_pairs(self.metrics)

    def __getstate__(self) -> dict[str, Any]:
        """The options alone travel to worker processes, not what was derived from them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def as_settings(self) -> dict[str, Any]:
        """The options as JSON, as the manifest and the part names record them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()} | {
            "rotation_k": str(self.rotation_k),
            "principal_rank": str(self.principal_rank),
        }


def _rank(option: str, value: int | str) -> Rank:
    try:
        return Rank(str(value))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
