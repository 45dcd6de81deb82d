"""Bytes on disk -> named lazy tensors, one file per format; a run = ordered steps and its ``run.json``."""

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorInfo, combine_digests
from geopd.checkpoints.opening import checkpoint_digest, holds_weights, open_checkpoint
from geopd.checkpoints.run import (
    Origin,
    Run,
    RunManifest,
    open_run,
    read_run_manifest,
    step_of,
    write_run_manifest,
)
from geopd.checkpoints.whole_text import write_whole

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Origin",
    "Run",
    "RunManifest",
    "TensorInfo",
    "checkpoint_digest",
    "combine_digests",
    "holds_weights",
    "open_checkpoint",
    "open_run",
    "read_run_manifest",
    "step_of",
    "write_run_manifest",
    "write_whole",
]
