"""Bytes on disk -> named lazy tensors, one file per format; a run = ordered steps and its ``run.json``."""

from geopd.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    NotEnoughMemoryError,
    TensorInfo,
    combine_digests,
    holds_conv1d,
)
from geopd.checkpoints.hub import located
from geopd.checkpoints.opening import checkpoint_digest, holds_weights, is_adapter, open_checkpoint, step_of
from geopd.checkpoints.run import (
    Origin,
    Run,
    RunManifest,
    open_run,
    read_run_manifest,
    write_run_manifest,
)
from geopd.checkpoints.whole_text import write_whole

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "NotEnoughMemoryError",
    "Origin",
    "Run",
    "RunManifest",
    "TensorInfo",
    "checkpoint_digest",
    "combine_digests",
    "holds_conv1d",
    "holds_weights",
    "is_adapter",
    "located",
    "open_checkpoint",
    "open_run",
    "read_run_manifest",
    "step_of",
    "write_run_manifest",
    "write_whole",
]
