"""Alarms on the live geometry: what is worth a warning, once a condition, and whether training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AlarmWatch", "Alarms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarms:
    """Conditions on the means over the watched matrices; None leaves one out.

    Args:
        stable_rank: (low, high): warns when the stable rank is outside.
        unlocked_below: warns when Sim_K to the previous look falls below this after having been at it or above: the
            update had found its directions and lost them. For scale, unrelated directions give K / n.
        invisible_below: warns when the visible share is below this and no larger than at the look before, although the
            norm grew, or stayed 0 at a learning rate above 0: the steps are lost in rounding to bf16. In a healthy
            start the share is small too, but grows with the norm.
        stop: whether a warning also ends training, after the step it belongs to.

    Raises:
        ValueError: no condition is set, the band is empty, a share is outside 0 to 1, or a value is of another type.
    """

    stable_rank: tuple[float, float] | None = None
    unlocked_below: float | None = None
    invisible_below: float | None = None
    stop: bool = False

    def __post_init__(self) -> None:
        if self.stable_rank is None and self.unlocked_below is None and self.invisible_below is None:
            raise ValueError("alarms: set stable_rank, unlocked_below or invisible_below, or pass none at all")
        band = self.stable_rank
        if band is not None and not _is_band(band):
            raise ValueError(f"alarms: stable_rank={band!r} is no band: give two numbers, (low, high)")
        for name in ("unlocked_below", "invisible_below"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0.0 < value <= 1.0):
                raise ValueError(f"alarms: {name}={value!r} is no share: give a number above 0 and at most 1")
        if not isinstance(self.stop, bool):
            raise ValueError(f"alarms: stop={self.stop!r}: give true or false")


def _is_number(value: Any) -> bool:
    # a configuration file may give anything; a bool is an int to Python
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_band(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
        return False
    return bool(value[0] < value[1])


class AlarmWatch:
    """The state of the alarms along a run, a function of the looks so far.

    Args:
        alarms: the conditions.
    """

    def __init__(self, alarms: Alarms) -> None:
        self.alarms = alarms
        self._raised: set[str] = set()
        self._was_locked = False
        self._last: tuple[float, float] | None = None  # visible share and norm of the look before

    def heed(self, means: Mapping[str, float], learning_rate: float = 0.0) -> list[str]:
        """Take in one look, in order; the warnings that are new with it.

        Args:
            means: of the watched matrices.
            learning_rate: the largest of the steps since the look before.
        """
        found = {
            "stable_rank": self._band(means.get("stable_rank")),
            "unlocked_below": self._unlocked(means.get("similarity_previous")),
            "invisible_below": self._invisible(means, learning_rate),
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

    def _invisible(self, means: Mapping[str, float], learning_rate: float) -> str | None:
        limit = self.alarms.invisible_below
        if limit is None or "visible_share" not in means or "update_norm" not in means:
            return None
        share, norm = means["visible_share"], means["update_norm"]
        last, self._last = self._last, (share, norm)
        if last is None or share >= limit or share > last[0]:
            return None
        if norm > last[1]:
            how = f"while the mean norm grew from {last[1]:.4g} to {norm:.4g}"
        elif norm == last[1] == 0.0 and learning_rate > 0.0:
            how = f"and no weight moved at a learning rate of {learning_rate:.4g} (or every gradient was 0)"
        else:
            return None
        return f"updates vanish below bf16: {share:.4g} of the entries visibly changed, below {limit:g}, {how}"
