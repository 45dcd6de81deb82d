"""Pure functions from rewards and log-probabilities to the coefficients a_t of the score-weighted gradient."""

from geopd.objectives.advantages import (
    GROUP_STD_OFFSET,
    group_normalised_advantages,
    mixed_advantages,
    reverse_kl_advantages,
)

__all__ = ["GROUP_STD_OFFSET", "group_normalised_advantages", "mixed_advantages", "reverse_kl_advantages"]
