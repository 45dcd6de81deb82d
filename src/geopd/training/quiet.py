"""Keep the training libraries' notices off the user's terminal; errors still show."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["quiet_training_libraries"]


def quiet_training_libraries(*, offline: bool = True) -> None:
    """Set transformers, TRL, datasets and accelerate to errors only, and by default forbid hub look-ups.

    Meant for a process of its own (a study stage, a command), because these settings are global.

    Args:
        offline: forbid hub look-ups.
    """
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Deprecations between these libraries are theirs to settle; warnings of other modules still show.
    warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate|datasets|torch)(\.|$)")
