"""``geopd measure``: all diagnostics of runs against their origin, into a results folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geopd.cli.cache import DEFAULT_GB, CacheDir, CacheLimit, cache_from
from geopd.cli.execution import Address, Engine, ShardOption, execution_from

if TYPE_CHECKING:
    from geopd.engine import MeasureOptions

_Base = Annotated[
    str, typer.Argument(help="The checkpoint the runs started from, or the word `origin` (run.json says).")
]
_Runs = Annotated[
    list[str], typer.Argument(help="Tuned checkpoints or folders of step-numbered ones; label=PATH names one.")
]
_Matrices = Annotated[
    list[str] | None,
    typer.Option(help="Preset (layers, attention, all) or glob over matrix names; repeatable.  [default: layers]"),
]
_Metrics = Annotated[
    list[str] | None,
    typer.Option(help="Metric or group (entrywise, update, full); repeatable.  [default: full]"),
]
_RotationK = Annotated[str, typer.Option(help="Leading subspaces compared: a number, or p/8 of p = min(rows, cols).")]
_Rank = Annotated[str, typer.Option(help="Rank of the reconstruction behind the principal mask: a number, or p/64.")]
_Alpha = Annotated[
    list[float] | None, typer.Option(help="Share of entries in a mask; repeatable.  [default: 0.5, 0.3]")
]
_Similarity = Annotated[list[int] | None, typer.Option(help="K of the subspace similarity; repeatable.  [default: 16]")]
_Hill = Annotated[list[int] | None, typer.Option(help="k of the Hill index; repeatable.  [default: 16]")]
_PerHead = Annotated[bool, typer.Option("--per-head", help="Attention matrices head by head instead of whole.")]
_Paradigm = Annotated[
    list[str] | None, typer.Option(help="label=sft|opd|rlvr|mix|other for a run without run.json; repeatable.")
]


def options_from(
    matrices: list[str] | None,
    metrics: list[str] | None,
    rotation_k: str,
    principal_rank: str,
    alpha: list[float] | None,
    eta: float,
    similarity_k: list[int] | None,
    hill_k: list[int] | None,
    nulls: int,
    sweeps: bool,
    per_head: bool,
) -> MeasureOptions:
    """The engine's options from the command line's; what was not given keeps its default."""
    from geopd.engine import MeasureOptions

    given = {"matrices": matrices, "metrics": metrics, "alpha": alpha, "similarity_k": similarity_k, "hill_k": hill_k}
    options = MeasureOptions(
        rotation_k=rotation_k,
        principal_rank=principal_rank,
        eta=eta,
        nulls=nulls,
        per_head=per_head,
        **{key: tuple(value) for key, value in given.items() if value},  # type: ignore[arg-type]
    )
    return options.with_sweeps() if sweeps else options


def paradigms_from(paradigm: list[str] | None) -> dict[str, str]:
    """``label=paradigm`` pairs.

    Raises:
        ValueError: if an item is not of that form.
    """
    pairs = {}
    for item in paradigm or []:
        label, equals, value = item.partition("=")
        if not (label and equals and value):
            raise ValueError(f"--paradigm {item}: give label=sft|opd|rlvr|mix|other")
        pairs[label] = value
    return pairs


def measure(
    base: _Base,
    runs: _Runs,
    out: Annotated[Path, typer.Option(help="Results folder; further runs accumulate in it.")],
    matrices: _Matrices = None,
    metrics: _Metrics = None,
    rotation_k: _RotationK = "512",
    principal_rank: _Rank = "64",
    alpha: _Alpha = None,
    eta: Annotated[float, typer.Option(help="Relative change that counts as visible.")] = 1e-3,
    similarity_k: _Similarity = None,
    hill_k: _Hill = None,
    nulls: Annotated[
        int, typer.Option(min=0, help="Draws of the Gaussian and permuted nulls; each costs a checkpoint.")
    ] = 0,
    sweeps: Annotated[
        bool, typer.Option("--sweeps", help="Also alpha 0.05, 0.1, 0.3, 0.5 and Hill k 8, 16, 32, 64.")
    ] = False,
    per_head: _PerHead = False,
    paradigm: _Paradigm = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.  [default: as cores and memory allow]")] = None,
    engine: Engine = "local",
    address: Address = None,
    shard: ShardOption = None,
    cache_dir: CacheDir = None,
    cache_gb: CacheLimit = DEFAULT_GB,
    replace: Annotated[bool, typer.Option("--replace", help="Redo a label whose inputs changed.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where matrices go; one worker a GPU.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    progress: Annotated[
        str | None, typer.Option(metavar="bar|json|none", help="Live lines, or JSON lines on stderr.  [default: bar]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Measure where runs moved the weights of their origin.

    Stops and resumes by itself: the same command again does only what is left.

    Example: geopd measure Qwen3-8B-SFT opd=runs/opd --paradigm opd=opd --out results
    """
    from geopd.engine import measure as run
    from geopd.engine.shards import Shard

    options = options_from(
        matrices, metrics, rotation_k, principal_rank, alpha, eta, similarity_k, hill_k, nulls, sweeps, per_head
    )
    outcome = run(
        base,
        runs,
        out,
        options=options,
        paradigms=paradigms_from(paradigm),
        workers=workers,
        replace=replace,
        execution=execution_from(engine, address, workers, device),
        cache=cache_from(cache_dir, cache_gb),
        shard=Shard.parse(shard) if shard else None,
        quiet=quiet or as_json,
        progress=progress,
        device=device,
    )
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "out": str(outcome.out),
                    "measured": outcome.measured,
                    "resumed": outcome.resumed,
                    "failed": outcome.failed,
                }
            )
        )
    else:
        _conclude(outcome.out, outcome.measured, outcome.resumed, outcome.failed, merges=shard is not None)
    raise typer.Exit(outcome.exit_code)


def _conclude(out: Path, measured: int, resumed: int, failed: dict[str, dict[str, str]], *, merges: bool) -> None:
    lost = sum(map(len, failed.values()))
    typer.echo(f"{measured} measured, {resumed} kept from before{f', {lost} of them failed' if lost else ''} -> {out}")
    for label, reasons in failed.items():
        for matrix, reason in list(reasons.items())[:10]:
            typer.echo(f"failed: {label}: {matrix}: {reason}", err=True)
        if len(reasons) > 10:
            typer.echo(f"failed: {label}: {len(reasons) - 10} more; `geopd show {out}` counts them", err=True)
    if merges:
        typer.echo(f"next, when all shards are done: geopd merge {out.parent.parent}")
    else:
        typer.echo(f"next: geopd show {out}   |   geopd report {out}")
