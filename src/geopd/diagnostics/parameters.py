"""What a measurement asks for: the parameters that define the values, as they are written under ``setting``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FRACTION = re.compile(r"p/([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Rank:
    """A number of leading directions: fixed (``512``) or a share of the matrix (``p/8``, p = min(m, n), at least 2).

    Raises:
        ValueError: if the text is neither a positive integer nor of the form ``p/N``.
    """

    text: str

    def __post_init__(self) -> None:
        if not (self.text.isdecimal() and int(self.text) > 0) and not _FRACTION.fullmatch(self.text):
            raise ValueError(
                f"{self.text!r} is no rank: give a positive integer (512) or a share of p = min(m, n) (p/8)"
            )

    def of(self, rows: int, cols: int) -> int:
        """The rank asked of an m x n matrix; a fixed one may exceed p."""
        if match := _FRACTION.fullmatch(self.text):
            return max(2, min(rows, cols) // int(match[1]))
        return int(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of the diagnostics; of a tuple the first is the headline (``is_default``).

    ``rotation_k``: leading subspaces compared, and the origin's subspaces that the update's energy is measured in.
    ``principal_rank``: rank of the reconstruction behind the principal mask. ``alphas``: mask shares. ``eta``: relative
    change that counts as visible. ``similarity_k``, ``hill_k``: leading directions of the update.

    Raises:
        ValueError: if a parameter is out of its range.
    """

    rotation_k: Rank = Rank("512")
    principal_rank: Rank = Rank("64")
    alphas: tuple[float, ...] = (0.5, 0.3)
    eta: float = 1e-3
    similarity_k: tuple[int, ...] = (16,)
    hill_k: tuple[int, ...] = (16,)

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 < alpha < 1 for alpha in self.alphas):
            raise ValueError(f"--alpha: shares must lie strictly between 0 and 1, not {self.alphas}")
        if not 0 <= self.eta < 1:
            raise ValueError(f"--eta: must lie in [0, 1), not {self.eta}")
        if not self.similarity_k or min(self.similarity_k) < 1:
            raise ValueError(f"--similarity-k: must be positive, not {self.similarity_k}")
        if not self.hill_k or min(self.hill_k) < 2:
            raise ValueError(f"--hill-k: needs at least 2 singular values, not {self.hill_k}")
        given: dict[str, tuple[float, ...]] = {
            "--alpha": self.alphas,
            "--similarity-k": self.similarity_k,
            "--hill-k": self.hill_k,
        }
        for option, values in given.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{option}: {', '.join(map(str, values))} names a value twice; give each once")
