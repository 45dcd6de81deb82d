"""The geometry of a run while it trains, through any Hugging Face Trainer to whatever logs it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from transformers import Trainer, TrainerCallback

from geopd.checkpoints import open_checkpoint, write_whole
from geopd.matrices import canonical_view
from geopd.training.geometry_alarms import Alarms, AlarmWatch
from geopd.training.live_geometry import LiveGeometry, MatrixValues, means, on_every_process, raise_everywhere
from geopd.training.live_weights import expert_stacks, live_matrices

__all__ = ["GeometryMonitor"]

_logger = logging.getLogger(__name__)


class GeometryMonitor(TrainerCallback):  # type: ignore[misc]
    """Logs every ``every`` optimiser steps where the weights stand against W0; changes nothing in training.

    ``GeometryMonitor(origin).attach(trainer)``, on every process. The values (see ``geopd.training.live_geometry``)
    are logged as unweighted means over the watched matrices, ``geometry/<metric>``, and per module,
    ``geometry/<metric>/<module>``. Those of every matrix go to ``geometry.jsonl`` in the output folder, a line a look.
    ``geometry/share_of_step_time`` is logged once: the seconds of the second look over those of ``every`` steps; in a
    run of a single look that one's, when training ends.

    Resuming from step t drops the file's lines beyond t. Where t is itself a step of a look the similarity to the
    previous look goes on without a gap; elsewhere the first look has none.

    Args:
        origin: W0 on disk, a checkpoint folder or safetensors file; read one tensor at a time.
        every: optimiser steps between looks.
        matrices: what to watch: presets (``attention``, ``layers``, ``all``) and globs over canonical names.
        similarity_k: K of the top-K energy and of Sim_K.
        reference: a file of ``geopd basis`` to compare with, read when training begins.
        alarms: conditions worth a warning, or None.

    Raises:
        ValueError: ``every`` is below 1.
    """

    def __init__(
        self,
        origin: Path | str,
        *,
        every: int = 10,
        matrices: Sequence[str] | str = ("attention",),
        similarity_k: int = 16,
        reference: Path | str | None = None,
        alarms: Alarms | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: look every 1 step or more")
        self.origin = Path(origin)
        self.every = every
        self.matrices = (matrices,) if isinstance(matrices, str) else tuple(matrices)
        self.similarity_k = similarity_k
        self.reference = None if reference is None else Path(reference)
        self.alarms = alarms
        self._trainer: Any = None
        self._geometry: LiveGeometry | None = None
        self._watch: AlarmWatch | None = None
        self._pending: dict[str, float] = {}
        self._noted: set[str] = set()
        self._looks = self._steps = 0
        self._step_began = self._stepping = self._first_cost = self._learning_rate = 0.0

    def attach(self, trainer: Any) -> Self:
        """Watch this trainer's model and log through it. Called on every process, before ``train``.

        The values join the trainer's own log line where one is due at the step of the look. Reporting callbacks have
        been called by the time a user's callback sees that line, so they are put in before it is logged: the
        trainer's ``log`` is wrapped. At other steps they get a line of their own from ``Trainer.log``, not from the
        ``log`` of a trainer that averages and clears its metrics there, as TRL's do.

        Raises:
            ValueError: the origin cannot be read or is of another architecture, nothing is selected, the reference
                does not fit, or a monitor is attached already.
        """
        attached = [c for c in trainer.callback_handler.callbacks if isinstance(c, GeometryMonitor)]
        if attached or self._trainer is not None:
            raise ValueError("a geometry monitor is attached already: one a trainer, and one trainer a monitor")
        self._open(trainer.model)
        stacks = expert_stacks(trainer.model, self.matrices)
        if stacks and trainer.args.process_index == 0:
            _logger.warning("%d stacks of experts are not watched, such as %s", len(stacks), stacks[0])
        self._trainer = trainer
        inner = trainer.log

        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            logs.update(self._pending)
            self._pending = {}
            inner(logs, *args, **kwargs)

        trainer.log = log
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Find the matrices in the model as it was prepared, and take up a run that is resumed."""
        if self._trainer is None:
            raise ValueError("the geometry monitor is not attached: GeometryMonitor(origin).attach(trainer)")
        geometry = self._open(kwargs["model"])
        self._watch = AlarmWatch(self.alarms) if self.alarms else None
        for line in _earlier_looks(args, state):
            if self._watch is not None:
                self._watch.heed(line["means"], line.get("learning_rate", 0.0))
        if state.global_step and state.global_step % self.every == 0:
            geometry.look()  # for the subspaces that the next look is compared with
        self._looks = self._steps = 0
        self._stepping = self._learning_rate = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the clock of a step, and note its learning rate."""
        self._flush()
        self._learning_rate = max(self._learning_rate, _learning_rate(kwargs.get("optimizer")))
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look when it is due: log, record and warn."""
        due = state.global_step % self.every == 0
        if due and torch.cuda.is_available():
            torch.cuda.synchronize()  # or the steps' queued kernels would count as the look's
        self._stepping += time.perf_counter() - self._step_began
        self._steps += 1
        if due:
            self._look(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Log what no line has taken, and the cost of a lone look."""
        if self._looks == 1:
            self._pending["geometry/share_of_step_time"] = self._first_cost
        self._flush()

    def _open(self, model: Any) -> LiveGeometry:
        reason, geometry = None, None
        try:
            origin = canonical_view(open_checkpoint(self.origin))
            watched = live_matrices(model, origin, self.matrices)
            geometry = LiveGeometry(origin, watched, self.similarity_k, self.reference)
        except ValueError as error:
            reason = f"geometry monitor: {error}"
        raise_everywhere(reason)
        assert geometry is not None
        self._geometry = geometry
        return geometry

    def _look(self, args: Any, state: Any, control: Any) -> None:
        assert self._geometry is not None
        began = time.perf_counter()
        rows = self._geometry.look()
        seconds = time.perf_counter() - began
        averages = means(rows)
        values = {f"geometry/{name}": value for name, value in averages.items()}
        self._looks += 1
        share = seconds / (self.every * self._stepping / self._steps)
        if self._looks == 1:  # it reads W0 from a cold disk, and starts libraries
            self._first_cost = share
        elif self._looks == 2:
            values["geometry/share_of_step_time"] = share
            _logger.info("a look takes %.3g s, %.2g of the time of %d steps", seconds, share, self.every)
        learning_rate = self._learning_rate
        self._stepping, self._steps, self._learning_rate = 0.0, 0, 0.0
        warned = self._watch.heed(averages, learning_rate) if self._watch else []
        if state.is_world_process_zero:
            self._warn(state.global_step, rows, warned)
            line = {"step": state.global_step, "k": self.similarity_k, "seconds": seconds}
            line |= {"learning_rate": learning_rate, "means": averages, "alarms": warned}
            _append(_file(args), line | {"matrices": [asdict(row) for row in rows]})
        if warned and self.alarms is not None and self.alarms.stop:
            control.should_training_stop = True
        if control.should_log:
            self._pending = values
        else:
            Trainer.log(self._trainer, values)

    def _warn(self, step: int, rows: Sequence[MatrixValues], warned: Sequence[str]) -> None:
        out = [row for row in rows if row.note is not None]
        if not self._noted.issuperset(row.name for row in out):
            self._noted.update(row.name for row in out)
            first = f"{out[0].name}: {out[0].note}"
            _logger.warning("step %d: %d of %d matrices left out, first %s", step, len(out), len(rows), first)
        for text in warned:
            _logger.warning("step %d: %s%s", step, text, "; training stops" if self.alarms and self.alarms.stop else "")

    def _flush(self) -> None:
        if self._pending:
            values, self._pending = self._pending, {}
            Trainer.log(self._trainer, values)


def _learning_rate(optimiser: Any) -> float:
    """The largest of an optimiser's parameter groups."""
    return max((float(group["lr"]) for group in getattr(optimiser, "param_groups", ())), default=0.0)


def _file(args: Any) -> Path:
    return Path(args.output_dir) / "geometry.jsonl"


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _earlier_looks(args: Any, state: Any) -> list[dict[str, Any]]:
    """The recorded looks up to the step training starts from, on every process; later ones leave the file."""
    kept: list[dict[str, Any]] = []
    reason = None
    if state.is_world_process_zero:
        try:
            kept = _keep_lines(_file(args), state.global_step)
        except ValueError as error:
            reason = str(error)
    raise_everywhere(reason)
    return [line for part in on_every_process(kept) for line in part]


def _keep_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the looks beyond a step, and a last line that was cut off; those that stay."""
    if not path.is_file():
        return []
    kept: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}: line {number} is not JSON ({error}): remove the file or mend it") from error
        if line["step"] <= step:
            kept.append(line)
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
