"""The effective rank of a gradient covariance, pair by pair in Python numbers."""

import math


def rank_by_pairs(gradients, prompts):
    """The pair estimator over the rows of (N, d)."""
    rows = gradients.double()
    above = below = 0.0
    for i in range(len(rows)):
        for j in range(len(rows)):
            if prompts[i] != prompts[j]:
                above += float(rows[i] @ rows[i]) * float(rows[j] @ rows[j])
                below += float(rows[i] @ rows[j]) ** 2
    return above / below


def jackknife(statistic, prompts):
    """Standard error of statistic(kept row indices), one prompt left out at a time."""
    names = sorted(set(prompts))
    left = [statistic([i for i, prompt in enumerate(prompts) if prompt != name]) for name in names]
    mean = sum(left) / len(left)
    return math.sqrt((len(names) - 1) / len(names) * sum((each - mean) ** 2 for each in left))
