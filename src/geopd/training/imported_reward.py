"""A reward function of one's own: imported by name, called with all columns, awaited where it is ``async``."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
import threading
import weakref
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["ImportedReward"]


class ImportedReward:
    """A reward function of one's own, with errors that carry its name.

    An ``async`` function is run to its end on an event loop of this object, the same for every batch, so that clients
    bound to a loop live on; nothing else need be asynchronous, evaluation included.

    Args:
        name: ``package.module:function`` or ``path/file.py:function``.
        folder: where it is looked for beside the installed packages; None is the working directory.

    Raises:
        ValueError: the name is no known reward, or cannot be imported, or is no function.
    """

    def __init__(self, name: str, folder: str | Path | None = None) -> None:
        place, separator, attribute = name.rpartition(":")
        if not separator or not place or not attribute:
            raise ValueError(
                f"reward {name!r} is unknown: use exact, math_verify, arithmetic, strings, or package.module:function"
            )
        root = Path.cwd() if folder is None else Path(folder)
        try:
            module = _module_of_file(root / place) if place.endswith(".py") else _module(place, root)
        except Exception as error:
            raise ValueError(
                f"reward {name!r}: {place} cannot be imported from {root} ({type(error).__name__}: {error})"
            ) from error
        if not hasattr(module, attribute):
            raise ValueError(f"reward {name!r}: {place} has no {attribute!r}; check the name after the colon")
        self._function = getattr(module, attribute)
        if not callable(self._function):
            raise ValueError(f"reward {name!r} is {type(self._function).__name__}, not a function: name a function")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.name = name
        self.__name__ = name

    def __call__(self, *args: Any, **columns: Any) -> Any:
        """The function's own rewards, or None where it gives none. Raises ValueError with its name when it fails."""
        try:
            rewards = self._function(*args, **columns)
            if inspect.isawaitable(rewards):
                rewards = self._awaited(rewards)
        except Exception as error:
            raise ValueError(f"reward {self.name!r} failed ({type(error).__name__}: {error})") from error
        if not isinstance(rewards, Sequence) or isinstance(rewards, str):
            raise ValueError(
                f"reward {self.name!r} returned {type(rewards).__name__}: return a list with one number or None a "
                "completion"
            )
        for reward in rewards:
            if reward is not None and not isinstance(reward, Real):
                raise ValueError(f"reward {self.name!r} returned {reward!r} in its list: return numbers or None")
        return list(rewards)

    def _awaited(self, rewards: Awaitable[Any]) -> Any:
        if self._loop is None:
            # In a thread, since the caller's may run a loop already, as a notebook's does.
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._loop.run_forever, name=self.name, daemon=True)
            thread.start()
            weakref.finalize(self, _end_loop, self._loop, thread)
        return asyncio.run_coroutine_threadsafe(_outcome(rewards), self._loop).result()


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _end_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(1.0)
    if not thread.is_alive():
        loop.close()


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _module(name: str, root: Path) -> ModuleType:
    with _on_path(root):
        return importlib.import_module(name)


@contextmanager
def _on_path(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
