"""Short ways to say what a value is worth: ok, undefined with a reason, or unresolved because its error is large."""

from __future__ import annotations

from dataclasses import replace

from geopd.results import Measurement, Status

COUNTED = "exact count"


def ok(
    metric: str,
    setting: str,
    value: float,
    error: float | None,
    method: str,
    *,
    default: bool = True,
    note: str | None = None,
) -> Measurement:
    """A value that holds within ``error``."""
    return Measurement(metric, setting, value, error, Status.OK, method, note, default)


def undefined(metric: str, setting: str, reason: str, *, default: bool = True) -> Measurement:
    """No value, because the definition gives none here."""
    return Measurement(metric, setting, None, None, Status.UNDEFINED, "definition", reason, default)


def resolved_within(
    metric: str,
    setting: str,
    value: float,
    error: float,
    limit: float,
    method: str,
    *,
    default: bool = True,
    note: str | None = None,
) -> Measurement:
    """A value, ``unresolved`` where its error exceeds ``limit`` (same unit)."""
    if error <= limit:
        return ok(metric, setting, value, error, method, default=default, note=note)
    reason = f"error bound {error:.3g} exceeds {limit:.3g}" + (f"; {note}" if note else "")
    return Measurement(metric, setting, value, error, Status.UNRESOLVED, method, reason, default)


def unresolved(item: Measurement, reason: str) -> Measurement:
    """The same value, not to be relied on, for this reason; what has no value stays as it is."""
    if item.status is not Status.OK:
        return item
    return replace(item, status=Status.UNRESOLVED, note=f"{reason}; {item.note}" if item.note else reason)


def failed(item: Measurement, reason: str) -> Measurement:
    """No value, because what was computed is wrong; what has no value stays as it is."""
    if item.value is None:
        return item
    return replace(item, value=None, error=None, status=Status.FAILED, note=reason)
