"""One measured pair against the float64 SVD protocol, in one run on one core.

The protocol is what the paper describes: a float64 SVD of W0 and of W+ as they lie, their spectra and principal angles.
Beside it: everything geopd measures for the same pair (all diagnostics and nulls), and for one checkpoint more of the
same matrix. Times are this machine's; the ratios are the point.

    python benchmarks/spectra.py [--sizes 512x512 1024x1024 ...]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters
from geopd.spectral import principal_angles

SIZES = ("1024x1024", "1024x4096", "2048x2048")


def pair(rows: int, cols: int, checkpoints: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A bf16 matrix with a power-law spectrum, and bf16 checkpoints that drift from it."""
    generator = torch.Generator().manual_seed(rows * 100_003 + cols)
    p = min(rows, cols)
    U = torch.linalg.qr(torch.randn(rows, p, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(cols, p, generator=generator)).Q
    W = (U * torch.arange(1, p + 1) ** -0.6) @ V.T
    W = W * (0.02 * (rows * cols) ** 0.5 / torch.linalg.matrix_norm(W))
    steps, current = [], W.bfloat16().float()
    for _ in range(checkpoints):
        current = current + 2e-4 * torch.randn(rows, cols, generator=generator)
        steps.append(current.bfloat16())
    return W.bfloat16(), steps


def protocol(W0: torch.Tensor, W1: torch.Tensor, k: int) -> None:
    """Spectra and angles by a full SVD of either matrix, as it lies."""
    U0, s0, Vh0 = torch.linalg.svd(W0.double(), full_matrices=False)
    U1, s1, Vh1 = torch.linalg.svd(W1.double(), full_matrices=False)
    torch.linalg.vector_norm(s1 - s0)
    principal_angles(U0[:, :k], U1[:, :k])
    principal_angles(Vh0[:k].T, Vh1[:k].T)


def suite(origin: OriginMatrix, W1: torch.Tensor) -> None:
    """Every diagnostic and null of one checkpoint."""
    comparison = Comparison(origin, W1)
    for diagnostic in CATALOGUE:
        diagnostic.measure(comparison)
        diagnostic.nulls(comparison)


def seconds(work: Callable[..., None], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="ROWSxCOLS")
    sizes = parser.parse_args().sizes
    torch.set_num_threads(1)
    table = Table("size", "protocol, s", "first checkpoint, s", "ratio", "further checkpoint, s", "ratio", "peak, GB")
    for size in track(sizes, description="sizes", console=Console(stderr=True)):
        rows, cols = (int(n) for n in size.split("x"))
        W0, (W1, W2) = pair(rows, cols, 2)
        parameters = Parameters()
        base = seconds(protocol, W0, W1, min(512, rows, cols))
        origin = OriginMatrix(W0, parameters)
        first = seconds(suite, origin, W1)
        further = seconds(suite, origin, W2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        table.add_row(
            size,
            f"{base:.2f}",
            f"{first:.2f}",
            f"{first / base:.2f}",
            f"{further:.2f}",
            f"{further / base:.2f}",
            f"{peak:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
