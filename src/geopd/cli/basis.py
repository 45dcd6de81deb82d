"""``geopd basis``: the subspace a run moved its weights in, for training inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from geopd.training.basis import Basis


def basis(
    base: Annotated[str, typer.Argument(help="The checkpoint the run started from, or `origin` (run.json says).")],
    run: Annotated[str, typer.Argument(help="A tuned checkpoint, or a folder of step-numbered ones.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    step: Annotated[int | None, typer.Option(help="Which of the run's steps.  [default: the last]")] = None,
    k: Annotated[int, typer.Option(help="Columns of V for every matrix.")] = 16,
    kind: Annotated[
        str,
        typer.Option(
            help="update: right singular vectors of dW; origin: of W0; random: Haar; mask: the entries that moved."
        ),
    ] = "update",
    seed: Annotated[int, typer.Option(help="Of a random basis.")] = 0,
    matrices: Annotated[
        list[str] | None,
        typer.Option(help="Preset (layers, attention, all) or glob over matrix names; repeatable.  [default: layers]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Write the subspace of a run's update, a control for it, or a mask of the entries that moved.

    Example: geopd basis origin runs/opd --step 63 --k 16 --out opd_63.safetensors
    """
    from rich.console import Console
    from rich.progress import Progress

    from geopd.training.bases_of_runs import basis_of_run
    from geopd.training.basis import check_destination, write_basis

    check_destination(out)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        bar = progress.add_task("matrices", total=None)
        made = basis_of_run(
            base,
            run,
            step=step,
            k=k,
            kind=kind,
            seed=seed,
            matrices=tuple(matrices or ("layers",)),
            advance=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    path = write_basis(out, made)
    if as_json:
        typer.echo(json.dumps(_as_json(path, made)))
    else:
        _print(path, made)


def _as_json(path: Path, made: Basis) -> dict[str, object]:
    provenance = made.provenance
    return {
        "out": str(path),
        "kind": provenance.kind,
        "k": provenance.k,
        "step": provenance.step,
        "origin": provenance.origin,
        "tuned": provenance.tuned,
        "matrices": {
            name: {
                "size": int(made.mask(name).sum()) if made.is_mask else made.vectors[name].shape[1],
                "energy_share": provenance.energy[name],
            }
            for name in made.names
        },
        "left_out": provenance.left_out,
    }


def _print(path: Path, made: Basis) -> None:
    provenance, energy = made.provenance, made.provenance.energy
    low, high = min(energy, key=energy.__getitem__), max(energy, key=energy.__getitem__)
    what = "entries that moved" if made.is_mask else f"K = {provenance.k}"
    at = "" if provenance.step is None else f" at step {provenance.step}"
    typer.echo(f"{provenance.kind} basis of {len(energy)} matrices{at}, {what} -> {path}")
    typer.echo(
        f"share of the update's energy inside: mean {sum(energy.values()) / len(energy):.3f}, from {energy[low]:.3f} "
        f"({low}) to {energy[high]:.3f} ({high})"
    )
    fewer = {name: V.shape[1] for name, V in made.vectors.items() if V.shape[1] < (provenance.k or 0)}
    for name, columns in fewer.items():
        of = "its update or of W0" if provenance.kind == "origin" else "its update"
        typer.echo(f"fewer columns: {name}: {columns}, the rank of {of}")
    for name, reason in provenance.left_out.items():
        typer.echo(f"left out: {name}: {reason}; training leaves it as it is")
