"""How far a run is, on stderr: a line for every log, and a bar on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

__all__ = ["TrainingProgress"]


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Says on the main process where training stands: its step with every log line, and a bar unless
    ``disable_tqdm``. Everything goes to stderr, so that stdout holds the outcome alone."""

    def __init__(self) -> None:
        self._bar: Any = None

    @classmethod
    def replace(cls, trainer: Any, *, quiet: bool) -> None:
        """Take the place of the Trainer's own printing, whose lines have no step; with ``quiet`` nothing does."""
        for own in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(own)
        if not quiet:
            trainer.add_callback(cls())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Say what is gone on from, and start the bar."""
        if not state.is_world_process_zero:
            return
        if state.global_step:
            print(f"going on from step {state.global_step} of {state.max_steps}", file=sys.stderr, flush=True)
        if not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        """Print the figures, behind their step."""
        if not logs or not state.is_world_process_zero:
            return
        figures = "  ".join(f"{name} {_shown(value)}" for name, value in logs.items() if name != "total_flos")
        line = f"step {state.global_step}/{state.max_steps}  {figures}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _shown(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)
