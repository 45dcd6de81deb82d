"""What an on-policy run optimises: how the two signals mix, which tokens count, and who writes the responses."""

from __future__ import annotations

from dataclasses import dataclass

from geopd.objectives import check_alpha, check_token_selection

__all__ = ["ROLLOUTS", "Objective"]

ROLLOUTS = ("student", "teacher")
"""Who samples the responses."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The coefficient a_t of the score-weighted gradient, and who samples.

    Source: arXiv 2606.07082, Sections 2 and 6.

    Args:
        alpha: weight of distillation against verifiable reward, in [0, 1].
        normalise: bring both signals to unit root mean square over the rollout's response tokens before mixing, so
            that alpha weighs directions and not magnitudes.
        token_selection: ``all``, or ``top-gap`` or ``random`` for a share of each response's tokens. Selection comes
            after mixing and acts on the whole coefficient.
        rho: the kept share in (0, 1]; 1 where all tokens are kept.
        rollouts: ``student``, or ``teacher``: the teacher writes the responses and the student scores them with the
            same formula and without importance weights. That is no longer the gradient of the reverse KL.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    alpha: float
    normalise: bool = False
    token_selection: str = "all"
    rho: float = 1.0
    rollouts: str = "student"

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_token_selection(self.token_selection, self.rho)
        if self.token_selection == "top-gap" and self.alpha == 0.0:
            raise ValueError("token_selection='top-gap' ranks by the gap to a teacher: alpha=0 has none, use random")
        if self.rollouts not in ROLLOUTS:
            raise ValueError(f"rollouts={self.rollouts!r} is unknown: use one of {', '.join(ROLLOUTS)}")

    @property
    def paradigm(self) -> str:
        """The paradigm's name: ``opd`` at alpha 1, ``rlvr`` at 0, ``mix`` between."""
        return {1.0: "opd", 0.0: "rlvr"}.get(self.alpha, "mix")

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores or writes the responses."""
        return self.alpha > 0.0 or self.rollouts == "teacher"
