"""Who measures, as ``geopd measure`` is told: ``--engine``, ``--address`` and ``--shard``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from geopd.engine import Execution

ENGINES = ("local", "ray")

Engine = Annotated[str, typer.Option(metavar="local|ray", help="Processes of this machine, or a Ray cluster's nodes.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="With --engine ray: the cluster's head.  [default: $RAY_ADDRESS, else a Ray started here]",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Measure only the I-th of N even shares of the matrices; `geopd merge` folds them all.",
    ),
]


def execution_from(engine: str, address: str | None, workers: int | None, device: str) -> Execution | None:
    """The executor that the options name; None for this machine's own.

    Raises:
        ValueError: if there is no such engine, or it cannot be had here.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: one of {', '.join(ENGINES)}")
    if engine == "local":
        if address is not None:
            raise ValueError(f"--address {address}: goes with --engine ray")
        return None
    from geopd.engine.local_execution import DEVICES
    from geopd.engine.ray_execution import RayExecution

    if device not in DEVICES:
        raise ValueError(f"--device {device}: one of {', '.join(DEVICES)}")
    return RayExecution(address, workers, device)
