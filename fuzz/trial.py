"""One damaged checkpoint opened and read: what may come of it, and everything else, which is a finding."""

from __future__ import annotations

import resource
import shutil
import signal
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from fuzz.mutations import mutate_folder
from fuzz.seeds import SEEDS, Seed
from geopd.checkpoints import CheckpointError, NotEnoughMemoryError, open_checkpoint
from geopd.checkpoints.restricted_pickle import read_pickle

SECONDS = 5.0  # processor time
SPARE_BYTES = 16 << 20  # beside four times the checkpoint's own size
ADDRESS_SPACE = 512 << 20  # beyond what the process holds when it starts
_READ = 4  # tensors read of each checkpoint that opens
_WEIGHED = 64  # one case in so many runs with its allocations counted


class HangError(BaseException):
    """A case took longer than ``SECONDS``; not an Exception, so that nothing catches it on the way."""


@dataclass
class Tally:
    """Cases by outcome, and the findings: (case, what happened)."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)


class Trial:
    """Cases of one seed checkpoint; a case is a pure function of the seed's name, the session's number and its own."""

    def __init__(self, target: str, session: int, scratch: Path) -> None:
        self.target, self.session, self.scratch = target, session, scratch
        self.seed: Seed = SEEDS[target]()
        self.tally = Tally()
        self._lies: dict[str, bytes] = {}

    def files(self, case: int) -> dict[str, bytes]:
        """The damaged checkpoint of a case."""
        random = Random(f"{self.target} {self.session} {case}")
        return mutate_folder(random, self.seed.files, self.seed.kept)

    def run(self, case: int) -> str | None:
        """Open and read one case; what is wrong with how that went, or None."""
        files = self.files(case)
        self._lay(files)
        weighed = case % _WEIGHED == 0
        if weighed:
            tracemalloc.start()
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                self.tally.outcomes[self._open(files)] += 1
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            wrong = None
        except NotEnoughMemoryError as error:
            wrong = f"more memory than there is: {error}"
        except CheckpointError as error:
            # refused by the net under all formats, and not for a fault that one of them looks for
            unforeseen = ": not readable (" in str(error)
            self.tally.outcomes["refused, unforeseen" if unforeseen else "refused"] += 1
            wrong = None if str(error).startswith(str(self.scratch)) else f"a message that names no file: {error}"
        except HangError:
            wrong = f"more than {SECONDS} s"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if weighed:
            allowed = 4 * sum(map(len, files.values())) + SPARE_BYTES
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            if peak > allowed:
                wrong = wrong or f"allocated {peak:,} bytes, more than {allowed:,}"
        if wrong is not None:
            self.tally.outcomes["wrong"] += 1
            self.tally.findings.append((case, wrong[:300]))
        return wrong

    def _lay(self, files: dict[str, bytes]) -> None:
        for name in self._lies.keys() - files.keys():
            (self.scratch / name).unlink()
        for name, data in files.items():
            if self._lies.get(name) != data:
                (self.scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (self.scratch / name).write_bytes(data)
        self._lies = files

    def _open(self, files: dict[str, bytes]) -> str:
        if self.target == "bare_pickle":
            from geopd.checkpoints.torch_zip import ALLOWED

            read_pickle(files["value.pkl"], self.scratch / "value.pkl", ALLOWED)
            return "read"
        base = self.scratch / self.seed.base if self.seed.base else None
        checkpoint = open_checkpoint(self.scratch / self.seed.path, base)
        for name in list(checkpoint.tensors)[:_READ]:
            try:
                tensor = checkpoint.read(name)
            except NotEnoughMemoryError:
                raise
            except CheckpointError:
                continue
            if tuple(tensor.shape) != checkpoint.tensors[name].shape:
                raise AssertionError(
                    f"{name}: shape {tuple(tensor.shape)}, the header {checkpoint.tensors[name].shape}"
                )
        return "partly read" if checkpoint.unreadable else "read"


def guard() -> None:
    """Bound this process's memory, and raise ``HangError`` when a case's time is over."""

    def over(_signum: int, _frame: FrameType | None) -> None:
        raise HangError

    signal.signal(signal.SIGPROF, over)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def keep(trial: Trial, case: int, folder: Path) -> Path:
    """Save a case's files for whoever repairs what it found."""
    home = folder / f"{trial.target}-{trial.session}-{case}"
    shutil.rmtree(home, ignore_errors=True)
    for name, data in trial.files(case).items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    return home
