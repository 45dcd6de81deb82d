"""Alarms on the live geometry: what is worth a warning, once a condition, and whether training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AlarmWatch", "Alarms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarms:
    """Conditions on the means over the watched matrices; None leaves one out.

    Args:
        stable_rank: (low, high): warns when the stable rank is outside.
        unlocked_below: warns when Sim_K to the previous look falls below this after having been at it or above: the
            update had found its directions and lost them. For scale, unrelated directions give K / n.
        invisible_below: warns when the visible share is below this while the update still grows: its steps are lost
            in rounding to bf16.
        stop: whether a warning also ends training, after the step it belongs to.

    Raises:
        ValueError: no condition is set, the band is empty, or a share is outside 0 to 1.
    """

    stable_rank: tuple[float, float] | None = None
    unlocked_below: float | None = None
    invisible_below: float | None = None
    stop: bool = False

    def __post_init__(self) -> None:
        if self.stable_rank is None and self.unlocked_below is None and self.invisible_below is None:
            raise ValueError("alarms: set stable_rank, unlocked_below or invisible_below, or pass none at all")
        band = self.stable_rank
        # a configuration file gives a list, or something else altogether
        if band is not None and not (isinstance(band, (tuple, list)) and len(band) == 2 and band[0] < band[1]):
            raise ValueError(f"alarms: stable_rank={band} is no band: give (low, high)")
        for name in ("unlocked_below", "invisible_below"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"alarms: {name}={value} is no share: give a number above 0 and at most 1")


class AlarmWatch:
    """The state of the alarms along a run, a function of the looks so far.

    Args:
        alarms: the conditions.
    """

    def __init__(self, alarms: Alarms) -> None:
        self.alarms = alarms
        self._raised: set[str] = set()
        self._was_locked = False
        self._last_norm = 0.0

    def heed(self, means: Mapping[str, float]) -> list[str]:
        """Take in the means of one look, in order; the warnings that are new with it."""
        found = {
            "stable_rank": self._band(means.get("stable_rank")),
            "unlocked_below": self._unlocked(means.get("similarity_previous")),
            "invisible_below": self._invisible(means.get("visible_share"), means.get("update_norm")),
        }
        new = {name: text for name, text in found.items() if text and name not in self._raised}
        self._raised |= set(new)
        return list(new.values())

    def _band(self, value: float | None) -> str | None:
        if self.alarms.stable_rank is None or value is None:
            return None
        low, high = self.alarms.stable_rank
        if low <= value <= high:
            return None
        return f"the mean stable rank {value:.4g} left the band {low:g} to {high:g}"

    def _unlocked(self, value: float | None) -> str | None:
        limit = self.alarms.unlocked_below
        if limit is None or value is None:
            return None
        if value >= limit:
            self._was_locked = True
            return None
        if not self._was_locked:
            return None
        return f"the subspace unlocked: mean similarity to the previous look fell to {value:.4g}, below {limit:g}"

    def _invisible(self, share: float | None, norm: float | None) -> str | None:
        limit = self.alarms.invisible_below
        if limit is None or share is None or norm is None:
            return None
        before, self._last_norm = self._last_norm, norm
        if share >= limit or norm <= before:
            return None
        return (
            f"updates vanish below bf16: {share:.4g} of the entries visibly changed, below {limit:g}, while the mean "
            f"norm grew from {before:.4g} to {norm:.4g}"
        )
