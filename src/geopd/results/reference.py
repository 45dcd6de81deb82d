"""Reference numbers of arXiv 2606.07082 (Qwen3-8B), for orientation beside measured ones.

They come from another model, other data and, for the overlaps, from alpha = 0.3; none is a target for other runs.
Numbers marked as read from figures are in ``FROM_FIGURES``.
"""

from __future__ import annotations

PAPER = "arXiv 2606.07082"
PAPER_MODEL = "Qwen3-8B"

REFERENCE: dict[str, dict[str, str]] = {
    "update_sparsity": {"sft": "8.1 %", "opd": "51.6 %", "rlvr": "77.2 %"},
    "visible_density": {"sft": "92.73 %", "opd": "46.28 %", "rlvr": "27.76 %"},
    "low_magnitude_overlap": {"sft": "31.88 %", "opd": "53.59 %", "rlvr": "73.48 %"},
    "principal_overlap": {"sft": "highest", "opd": "below the baseline", "rlvr": "lowest"},
    "rotation": {"sft": "> 10°", "opd": "about 1°", "rlvr": "< 0.5°"},
    "spectral_shift": {"sft": "1e-3", "opd": "1e-4", "rlvr": "1e-5"},
    "update_norm": {"sft": "4.701", "opd": "0.452", "rlvr": "0.168"},
    "hill_tail": {"sft": "rises sharply", "opd": "2.34 → 2.93", "rlvr": "falls"},
    "stable_rank": {"sft": "expands, 20 → 75", "opd": "narrow low band, 20–30", "rlvr": "contracts to OPD's end"},
    "subspace_similarity": {"sft": "gradual", "opd": "high from the first checkpoint", "rlvr": "gradual"},
    "projection": {"sft": "55.5 % free, 45.6 % projected", "opd": "63.3 % free, 64.2 % projected", "rlvr": "–"},
    "token_sparsification": {"sft": "–", "opd": "same stable-rank path at 25 and 50 % of the tokens", "rlvr": "–"},
    "teacher_rollouts": {"sft": "–", "opd": "same stable-rank path on the teacher's rollouts", "rlvr": "–"},
    "mixture": {"sft": "–", "opd": "departs from OPD's path only where its share is small", "rlvr": "–"},
    "variants": {"sft": "–", "opd": "sparsity 48.6 to 57.1 %, the baseline 51.6 %", "rlvr": "–"},
}

FROM_FIGURES = frozenset({"update_norm", "hill_tail", "stable_rank", "projection"})
"""Rows read from the paper's figures or source rather than its text."""
