"""``geopd cache``: what the decomposition cache holds, and emptying it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from geopd.engine.decomposition_cache import DecompositionCache

OFF = "none"  # the word for: no cache

CacheDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Where origins' decompositions are kept for later runs; `none` keeps none.  "
        "[default: $XDG_CACHE_HOME/geopd/decompositions, by default under ~/.cache]",
    ),
]
CacheLimit = Annotated[float, typer.Option("--cache-gb", min=0.0, help="Size that the cache is kept under, in GiB.")]
DEFAULT_GB = 20.0

cache = typer.Typer(help="The cache of origins' decompositions: what it holds, and emptying it.", no_args_is_help=True)
_AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
_Folder = Annotated[Path | None, typer.Option("--cache-dir", metavar="DIR", help="As given to `geopd measure`.")]


def cache_from(cache_dir: str | None, gigabytes: float) -> DecompositionCache | None:
    """The cache that ``--cache-dir`` and ``--cache-gb`` ask for; None for ``none``.

    Raises:
        ValueError: if the folder cannot be one.
    """
    from geopd.engine.decomposition_cache import DecompositionCache, default_cache_dir

    if cache_dir == OFF:
        return None
    root = Path(cache_dir).absolute() if cache_dir else default_cache_dir()
    if root.exists() and not root.is_dir():
        raise ValueError(f"--cache-dir {root}: is a file; name a folder, or `{OFF}` to keep no decompositions")
    return DecompositionCache(root, int(gigabytes * 2**30))


@cache.command()
def info(cache_dir: _Folder = None, as_json: _AsJson = False) -> None:
    """Say how many decompositions are kept, how large they are and when they were last used.

    Example: geopd cache info
    """
    held = _named(cache_dir)
    found = held.contents()
    if as_json:
        uses = {"oldest_use": found.oldest_use, "newest_use": found.newest_use}
        typer.echo(json.dumps({"cache_dir": str(held.root), "entries": found.entries, "bytes": found.bytes} | uses))
        return
    typer.echo(f"{held.root}: {found.entries} decomposition(s), {found.bytes / 2**30:.2f} GB")
    if found.oldest_use is not None and found.newest_use is not None:
        typer.echo(f"last used between {_date(found.oldest_use)} and {_date(found.newest_use)}")


@cache.command()
def clear(cache_dir: _Folder = None, as_json: _AsJson = False) -> None:
    """Remove every decomposition kept; measurements stay, and later ones compute them anew.

    Example: geopd cache clear
    """
    held = _named(cache_dir)
    found = held.clear()
    if as_json:
        typer.echo(json.dumps({"cache_dir": str(held.root), "entries": found.entries, "bytes": found.bytes}))
    else:
        typer.echo(f"{held.root}: removed {found.entries} decomposition(s), {found.bytes / 2**30:.2f} GB")


def _named(cache_dir: Path | None) -> DecompositionCache:
    held = cache_from(str(cache_dir) if cache_dir else None, DEFAULT_GB)
    if held is None:
        raise ValueError(f"--cache-dir {OFF}: keeps nothing; name the folder")
    return held


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
