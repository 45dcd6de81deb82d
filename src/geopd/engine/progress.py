"""What a measurement says while it runs: a live line in a terminal, JSON lines for logs, or nothing. All on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from geopd.engine.workload import Task
from geopd.results.printable import printable

KINDS = ("bar", "json", "none")
Done = Callable[[dict[str, Any]], None]
_SHOWN = 3  # matrices named in the live line


class Reporter(Protocol):
    """Hears what happens; every number is of this call."""

    def say(self, text: str) -> None:
        """One line about the plan or an outcome."""
        ...

    @contextmanager
    def reading(self, total: int) -> Iterator[Callable[[int], None]]:
        """While inputs are read and digested: gives what is told of bytes done."""
        ...

    @contextmanager
    def measuring(self, costs: Sequence[float], current: Callable[[], Sequence[Task]]) -> Iterator[Done]:
        """While tasks run: gives what is told of each that ended, by its line of the log."""
        ...


def reporter(kind: str) -> Reporter:
    """The reporter of a name: ``bar``, ``json`` or ``none``.

    Raises:
        ValueError: if the name is none of these.
    """
    if kind not in KINDS:
        raise ValueError(f"--progress {kind}: one of {', '.join(KINDS)}")
    if kind == "json":
        return JsonLines(sys.stderr)
    return Terminal(Console(stderr=True, quiet=kind == "none"))


class Terminal:
    """Lines and live bars; where stderr is no terminal, lines alone."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print it."""
        self._console.print(printable(text), highlight=False, soft_wrap=True)

    def _bar(self, *columns: Any) -> Progress:
        quiet = self._console.quiet or not self._console.is_terminal  # elsewhere a bar leaves an empty line behind
        return Progress(*columns, console=self._console, transient=True, disable=quiet)

    @contextmanager
    def reading(self, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of bytes."""
        columns = (SpinnerColumn(), TextColumn("reading inputs"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with self._bar(*columns) as progress:
            bar = progress.add_task("", total=total)
            yield lambda done: progress.advance(bar, done)

    @contextmanager
    def measuring(self, costs: Sequence[float], current: Callable[[], Sequence[Task]]) -> Iterator[Done]:
        """A bar in units of expected work, with matrices done, their rate, those under way and the time left."""
        clock = Clock(costs)

        class Live(ProgressColumn):
            def render(self, task: Any) -> Text:  # noqa: ARG002 - what is under way is asked, not told
                return Text(printable(clock.line([t.weight.name for t in current()])))

        with self._bar(SpinnerColumn(), BarColumn(), Live()) as progress:
            bar = progress.add_task("", total=sum(costs))

            def done(line: dict[str, Any]) -> None:
                clock.done(line["expected_seconds"])
                progress.advance(bar, line["expected_seconds"])
                if line["status"] != "ok":
                    self.say(f"[red]failed[/] {escape(line['matrix'])}: {escape(str(line['reason']))}")

            yield done
        self.say(clock.summary())


class JsonLines:
    """One JSON object a line: ``event`` is note, reading, measuring, task or measured."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def _write(self, event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}, allow_nan=False), file=self._file, flush=True)

    def say(self, text: str) -> None:
        """A note, without its markup."""
        self._write("note", text=Text.from_markup(text).plain)

    @contextmanager
    def reading(self, total: int) -> Iterator[Callable[[int], None]]:
        """One line before: how much is read."""
        self._write("reading", bytes=total)
        yield lambda done: None  # noqa: ARG005

    @contextmanager
    def measuring(self, costs: Sequence[float], current: Callable[[], Sequence[Task]]) -> Iterator[Done]:
        """One line before, one a task, one behind."""
        clock = Clock(costs)
        self._write("measuring", tasks=len(costs), expected_seconds=sum(costs))

        def done(line: dict[str, Any]) -> None:
            clock.done(line["expected_seconds"])
            names = [task.weight.name for task in current()]
            self._write("task", **line, done=clock.finished, of=len(costs), left_seconds=clock.left(), current=names)

        yield done
        self._write("measured", tasks=clock.finished, seconds=clock.elapsed())


class Clock:
    """How much of the expected work is done, how fast, and what is left."""

    def __init__(self, costs: Sequence[float]) -> None:
        self._started = time.monotonic()
        self._total, self._count = sum(costs), len(costs)
        self._spent = 0.0
        self.finished = 0

    def done(self, expected: float) -> None:
        """A task of this expected cost ended."""
        self._spent += expected
        self.finished += 1

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def left(self) -> float | None:
        """Seconds to the end at the pace so far; None before there is one."""
        return self.elapsed() * (self._total - self._spent) / self._spent if self._spent > 0 else None

    def line(self, names: Sequence[str]) -> str:
        """The live line."""
        left = self.left()
        pace = f"{self.finished / self.elapsed() * 60:.3g}/min" if self.finished else "no pace yet"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        rest = "" if left is None else f", {span(left)} left"
        return f"{self.finished}/{self._count} matrices, {pace}{rest}: {', '.join(names[:_SHOWN])}{more}"

    def summary(self) -> str:
        """What is said at the end."""
        return f"measured {self.finished} matrices in {span(self.elapsed())}"


def span(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
