"""The terminal display of a running study: one line a stage, and the time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from geopd.study.schedule import StageStatus
from geopd.study.stages import Scale

__all__ = ["StudyDisplay"]

_SPEED_WINDOW_SECONDS = 120.0
_FEW_STAGES = 12


class StudyDisplay:
    """A rich progress display; a context manager that shows nothing when ``quiet``.

    The total is in expected core-seconds of the stages, so the time left weighs long stages as long.

    Args:
        scale: the stages and their expected costs.
        quiet: show nothing.
        console: where to draw; standard error by default, so that standard output stays free for results.
    """

    def __init__(self, scale: Scale, quiet: bool = False, console: Console | None = None) -> None:
        self.costs = {stage.name: stage.cost for stage in scale.stages}
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet,
            speed_estimate_period=_SPEED_WINDOW_SECONDS,
        )
        self.tasks: dict[str, TaskID] = {}
        self.total = self.progress.add_task("training", total=sum(self.costs.values()), note="time left")

    def __enter__(self) -> StudyDisplay:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, statuses: dict[str, StageStatus]) -> None:
        """Draw the statuses that a schedule reports."""
        for name, status in statuses.items():
            if status.state == "waiting":
                continue
            if name not in self.tasks:
                self.tasks[name] = self.progress.add_task(name, total=1.0, note="")
            note = "already finished" if status.state == "resumed" else status.doing
            # many stages would fill the terminal: then only those under way are shown
            shown = len(statuses) <= _FEW_STAGES or status.share < 1.0
            self.progress.update(self.tasks[name], completed=status.share, note=note, visible=shown)
        done = sum(self.costs[name] * status.share for name, status in statuses.items())
        finished = sum(status.share >= 1.0 for status in statuses.values())
        self.progress.update(self.total, completed=done, note=f"{finished} of {len(statuses)} stages, time left")
