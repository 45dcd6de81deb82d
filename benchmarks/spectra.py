"""The spectral core and the whole suite against the float64 SVD protocol, in one run on one core.

The protocol is the paper's: a float64 SVD of W0 and of W+, their spectra and principal angles. Beside it, for the same
pair: geopd's decomposition of one matrix, its floor (the same matrix products and tridiagonalisation timed alone), the
whole suite with all closed-form nulls for a first and for one checkpoint more, that also with the Hill sweep to k = 64,
what the nulls add, how far NSS and angles are from the protocol's, and the peak of anonymous memory beyond the inputs.
Last an embedding, every metric: seconds and memory only. Each size runs in a process of its own. Times are this
machine's processor seconds; the ratios are the point. The update is either pure Gaussian (``noise``: a flat spectrum,
the worst case for its leading triples) or of rank 16 (``rank 16``), stored in bf16.

    python benchmarks/spectra.py [--sizes 1024x1024 ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.linalg import lapack

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank
from geopd.spectral import decompose, principal_angles

SIZES = ("768x2048", "1024x1024", "1024x4096", "2048x2048", "4096x4096", "12288x4096")
EMBEDDING = "151936x4096"
UPDATES = ("noise", "rank 16")


def pair(rows: int, cols: int, checkpoints: int, update: str = "noise") -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A bf16 matrix with a power-law spectrum, and bf16 checkpoints that drift from it by rms 2e-4 each."""
    generator = torch.Generator().manual_seed(rows * 100_003 + cols)
    p = min(rows, cols)
    # a power law on Gaussian directions: orthogonal to 1/sqrt(p), which no timing can tell
    U = torch.randn(rows, p, generator=generator) * torch.arange(1, p + 1) ** -0.6
    W = U @ torch.randn(p, cols, generator=generator)
    W *= 0.02 * (rows * cols) ** 0.5 / torch.linalg.vector_norm(W)
    steps, current = [], W.bfloat16().float()
    for _ in range(checkpoints):
        if update == "noise":
            step = torch.randn(rows, cols, generator=generator)
        else:
            step = torch.randn(rows, 16, generator=generator) @ torch.randn(16, cols, generator=generator) / 4
        current = current + 2e-4 * step
        steps.append(current.bfloat16())
    return W.bfloat16(), steps


def protocol(W0: torch.Tensor, W1: torch.Tensor, k: int) -> tuple[float, tuple[torch.Tensor, torch.Tensor]]:
    """NSS and angles by a full SVD of either matrix (tall, as LAPACK is faster that way)."""
    W0, W1 = (W.double() if W.shape[0] >= W.shape[1] else W.double().T for W in (W0, W1))
    U0, s0, Vh0 = torch.linalg.svd(W0, full_matrices=False)
    U1, s1, Vh1 = torch.linalg.svd(W1, full_matrices=False)
    shift = float(torch.linalg.vector_norm(s1 - s0) / torch.linalg.vector_norm(s0))
    return shift, (principal_angles(U0[:, :k], U1[:, :k]), principal_angles(Vh0[:k].T, Vh1[:k].T))


def floor(W: torch.Tensor, k: int) -> None:
    """What no path through the Gram matrix avoids: the products and the tridiagonalisation."""
    A = W.double() if W.shape[0] >= W.shape[1] else W.double().T
    G = (A.T @ A).numpy()
    lapack.dsytrd(G.T, lower=1, lwork=64 * G.shape[0], overwrite_a=1)
    A @ torch.ones(A.shape[1], k, dtype=torch.float64)


def suite(origin: OriginMatrix, W1: torch.Tensor) -> tuple[Comparison, float]:
    """Every diagnostic and closed-form null of one checkpoint, and the seconds of the nulls."""
    comparison, added = Comparison(origin, W1), 0.0
    for diagnostic in CATALOGUE:
        diagnostic.measure(comparison)
        added += seconds(diagnostic.nulls, comparison)[0]
    return comparison, added


def seconds(work: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    started = time.process_time()
    result = work(*arguments)
    return time.process_time() - started, result


class AnonymousMemory:
    """Peak of this process's anonymous memory while it is watched, in GB."""

    def __enter__(self) -> AnonymousMemory:
        self.base = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20

    @property
    def beyond(self) -> float:
        """GB beyond what was held at the start."""
        return self.peak - self.base


def bench(rows: int, cols: int, update: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    W0, (W1, W2) = pair(rows, cols, 2, update)
    k = min(512, rows // 2, cols // 2)
    origin = OriginMatrix(W0, Parameters(rotation_k=Rank(str(k))))
    one = min(seconds(decompose, W1, k)[0] for _ in range(2))
    with AnonymousMemory() as memory:
        first, (comparison, first_nulls) = seconds(suite, origin, W1)
        further, (_, nulls) = seconds(suite, origin, W2)
    origin.parameters = replace(origin.parameters, hill_k=(16, 8, 32, 64))
    swept, _ = seconds(suite, origin, W2)
    least, _ = seconds(floor, W1, k)
    base, (shift, angles) = seconds(protocol, W0, W1, k)
    sigma0, sigma1 = origin.decomposition.sigma, comparison.after.sigma
    ours = float(torch.linalg.vector_norm(sigma1 - sigma0) / torch.linalg.vector_norm(sigma0))
    sides = ("left", "right") if rows >= cols else ("right", "left")
    off = max(
        float(np.abs(comparison.angles(side) - theta.numpy()).max()) for side, theta in zip(sides, angles, strict=True)
    )
    return {
        "protocol": base,
        "one": one,
        "floor": least,
        "first": first,
        "further": further,
        "swept": swept,
        "first_nulls": first_nulls,
        "nulls": nulls,
        "nss": abs(ours / shift - 1),
        "angle": off,
        "memory": memory.beyond,
    }


def embedding(rows: int, cols: int, update: str) -> dict[str, Any]:
    """Seconds and memory of a first checkpoint of an embedding, every metric asked for."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    W0, W1 = (torch.empty(rows, cols, dtype=torch.bfloat16) for _ in range(2))
    directions = torch.randn(16, cols, generator=generator) / 4
    scales = 0.02 * torch.arange(1, cols + 1) ** -0.3
    for start in range(0, rows, 4096):
        block = (torch.randn(min(4096, rows - start), cols, generator=generator) * scales).bfloat16()
        step = torch.randn(block.shape[0], 16, generator=generator) @ directions
        W0[start : start + 4096], W1[start : start + 4096] = block, (block.float() + 2e-4 * step).bfloat16()
    origin = OriginMatrix(W0, Parameters())
    with AnonymousMemory() as memory:
        first, _ = seconds(suite, origin, W1)
    return {"first": first, "memory": memory.beyond, "update": update}


def row(size: str, update: str, found: dict[str, Any]) -> list[str]:
    base, one = found["protocol"], found["one"]
    return [
        size,
        update,
        f"{base:.1f}",
        f"{one:.2f}",
        f"{base / 2 / one:.1f}x",
        f"{one / found['floor']:.2f}",
        f"{found['first']:.1f}",
        f"{found['further']:.2f}",
        f"{found['further'] / one:.2f}",
        f"{found['swept'] / one:.2f}",
        f"{found['first_nulls'] / one:.2f}, {found['nulls'] / one:.2f}",
        f"{found['nss']:.0e}",
        f"{found['angle']:.0e}",
        f"{found['memory']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=(*SIZES, EMBEDDING), metavar="ROWSxCOLS")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        rows, cols, update = arguments.one
        work = embedding if f"{rows}x{cols}" == EMBEDDING else bench
        print(json.dumps(work(int(rows), int(cols), update)))
        return
    table = Table(
        "size",
        "update",
        "protocol, s",
        "decomposition, s",
        "against one SVD",
        "over its floor",
        "first checkpoint, s",
        "further, s",
        "further / decomposition",
        "with Hill to 64",
        "nulls / decomposition (first, further)",
        "NSS off by, rel.",
        "angles off by, deg",
        "memory, GB",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    embeddings: list[str] = []
    cases = [(size, update) for size in arguments.sizes for update in UPDATES if (size, update) != (EMBEDDING, "noise")]
    for size, update in track(cases, description="sizes", console=Console(stderr=True)):
        command = [sys.executable, __file__, "--one", *size.split("x"), update]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        if size == EMBEDDING:
            embeddings.append(f"{size}, {update}: {found['first']:.0f} s, {found['memory']:.2f} GB beyond the inputs")
        else:
            table.add_row(*row(size, update, found))
    console = Console(width=180)
    console.print(table)
    for line in embeddings:
        console.print(f"embedding, every metric: {line}")


if __name__ == "__main__":
    main()
