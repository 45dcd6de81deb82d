"""What each metric is called, measured in and says: one line per metric, read by the terminal, the report and docs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """Label, unit and plain-language gloss of one metric; ``source`` is where the definition comes from."""

    name: str
    label: str
    unit: str
    gloss: str
    source: str


_ALL = (
    Metric(
        "update_sparsity",
        "update sparsity",
        "share of entries",
        "Share of weights that did not visibly change once both ends are rounded to bf16.",
        "arXiv 2606.07082, section 3",
    ),
    Metric(
        "sub_ulp_share",
        "change too small for bf16",
        "share of moved entries",
        "Share of the weights that moved at all whose change is under half a bf16 step: saved in bf16 it is lost.",
        "geopd",
    ),
    *(
        Metric(
            f"visible_mask_{kind}",
            f"visible changes foreseen, {kind}",
            "share of changed entries",
            f"{gloss} half a bf16 step is the line between a change that is seen and one that is lost.",
            "arXiv 2606.07082, Gate III",
        )
        for kind, gloss in (
            ("jaccard", "Of the weights foreseen to change visibly or that did, the share that are both:"),
            ("precision", "Of the weights foreseen to change visibly, the share that did:"),
            ("recall", "Of the weights that visibly changed, the share foreseen:"),
        )
    ),
    Metric(
        "support_jaccard",
        "coordinates shared by two runs",
        "share of changed entries",
        "Of the weights that visibly changed in either run, the share that changed in both.",
        "geopd",
    ),
    Metric(
        "sign_agreement",
        "direction shared by two runs",
        "share of changed entries",
        "Of the weights that visibly changed in both runs, the share that moved the same way.",
        "geopd",
    ),
    *(
        Metric(
            f"rotation_{side}_{summary}_deg",
            f"{side} rotation, {summary}",
            "degrees",
            f"{summary.capitalize()} principal angle between the top-k {side} singular subspaces before and after.",
            "arXiv 2606.07082, section 3",
        )
        for side in ("left", "right")
        for summary in ("mean", "median", "max")
    ),
    Metric(
        "spectral_shift",
        "normalised spectral shift",
        "relative",
        "How far all singular values moved together, relative to their own size.",
        "arXiv 2606.07082, section 3",
    ),
    Metric(
        "principal_overlap",
        "principal-mask overlap",
        "share of changed entries",
        "Share of the visibly changed weights that lie where the origin's leading rank-r part is largest.",
        "arXiv 2511.08567",
    ),
    Metric(
        "low_magnitude_overlap",
        "low-magnitude overlap",
        "share of changed entries",
        "Share of the visibly changed weights that lie among the origin's smallest weights.",
        "arXiv 2511.08567",
    ),
    Metric(
        "update_norm", "update norm", "weight units", "Frobenius norm of the update.", "arXiv 2606.07082, section 4"
    ),
    Metric(
        "relative_update_norm",
        "relative update norm",
        "relative",
        "Frobenius norm of the update over the origin's.",
        "geopd",
    ),
    Metric(
        "update_operator_norm",
        "update operator norm",
        "weight units",
        "Largest singular value of the update.",
        "arXiv 2606.07082, section 4",
    ),
    Metric(
        "stable_rank",
        "stable rank",
        "dimensions",
        "How many directions carry the update's energy: squared Frobenius over squared operator norm.",
        "arXiv 2606.07082, section 4",
    ),
    Metric(
        "stable_rank_denoised",
        "stable rank without rounding",
        "dimensions",
        "Stable rank the update would have had without being rounded to bf16.",
        "geopd",
    ),
    Metric(
        "rounding_noise_share",
        "rounding in the update",
        "share of energy",
        "Share of the stored update's squared norm that rounding to bf16 explains.",
        "geopd",
    ),
    Metric(
        "decay_coefficient",
        "decay coefficient",
        "relative",
        "How far the weights moved along themselves: negative is weight decay.",
        "geopd",
    ),
    Metric(
        "hill_tail",
        "Hill tail index",
        "exponent",
        "How fast the update's leading singular values fall off; smaller means a heavier head.",
        "arXiv 2606.07082, section 4",
    ),
    Metric(
        "subspace_similarity",
        "similarity to the final subspace",
        "share",
        "Overlap of the update's top-K right singular subspace with the one at the last checkpoint.",
        "arXiv 2606.07082, section 4",
    ),
    Metric(
        "increment_similarity",
        "similarity of successive increments",
        "share",
        "Overlap of the top-K right singular subspaces of the last two increments between checkpoints.",
        "geopd",
    ),
    Metric(
        "subspace_gap",
        "gap below the top-K subspace",
        "relative",
        "How firmly the update's top-K subspace is held: the gap at K over the largest singular value.",
        "geopd",
    ),
    *(
        Metric(
            f"principal_energy_{side}",
            f"update energy in the origin's top-k {side} subspace",
            "share of energy",
            f"Share of the update's squared norm inside the origin's top-k {side} singular subspace.",
            "geopd",
        )
        for side in ("left", "right")
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def metric_of(name: str) -> Metric:
    """The catalogue's entry, or a bare one for a metric that another version wrote."""
    return METRICS.get(name) or Metric(name, name.replace("_", " "), "", "", "")


def format_value(name: str, value: float | None) -> str:
    """A value for human eyes: shares of entries or energy as percentages, the rest to three significant digits.

    A missing value is written as a dash. Files and JSON carry the unrounded number instead.
    """
    if value is None:
        return "–"
    if metric_of(name).unit.startswith("share of"):
        return f"{100 * value:.1f} %" if value < 0.9995 or value == 1.0 else f"{100 * value:.3f} %"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
