"""Pure functions from rewards and log-probabilities to the coefficients a_t of the score-weighted gradient."""

from geopd.objectives.advantages import (
    GROUP_STD_OFFSET,
    check_alpha,
    group_normalised_advantages,
    mixed_advantages,
    normalised_mixture,
    reverse_kl_advantages,
    signal_energy,
)
from geopd.objectives.token_selection import TOKEN_SELECTIONS, check_token_selection, token_weights

__all__ = [
    "GROUP_STD_OFFSET",
    "TOKEN_SELECTIONS",
    "check_alpha",
    "check_token_selection",
    "group_normalised_advantages",
    "mixed_advantages",
    "normalised_mixture",
    "reverse_kl_advantages",
    "signal_energy",
    "token_weights",
]
