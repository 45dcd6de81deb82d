"""How many weights did not visibly change? bf16-aware update sparsity (arXiv 2606.07082, section 3).

An entry is unchanged iff |w+ - w0| <= eta * max(|w0|, |w+|); sparsity = 1 - changed / n. Both ends are rounded to bf16
first (``view=bf16``); after that cast every eta below 2^-8 is the same mask. Null: a Gaussian update of the stored
energy (geopd.diagnostics.gaussian_update).
"""

from __future__ import annotations

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.gaussian_update import gaussian_sparsity
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.values import COUNTED, ok
from geopd.results import Measurement, Null, setting

METRICS = ("update_sparsity",)


def default_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return setting(eta=parameters.eta, view="bf16")


def measure(comparison: Comparison) -> list[Measurement]:
    """Share of entries that did not visibly change, per view; exact."""
    return [
        ok(
            METRICS[0],
            setting(eta=comparison.parameters.eta, view=view),
            1.0 - int(comparison.changed_counts(view).sum()) / comparison.stored.numel(),
            0.0,
            COUNTED,
            default=view == "bf16",
        )
        for view in comparison.views
    ]


def nulls(comparison: Comparison) -> list[Null]:
    """Sparsity of an isotropic Gaussian update of the same stored energy."""
    found = []
    for view in comparison.views:
        null = gaussian_sparsity(comparison, view)
        if null is not None:
            mean, sd, method = null
            name = setting(eta=comparison.parameters.eta, view=view)
            found.append(Null(METRICS[0], name, "gaussian", mean, sd, 0, method, view == "bf16"))
    return found
