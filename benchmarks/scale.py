"""What a real model takes: two layers of Qwen3-8B's shape through the whole engine, and projected from there.

A base and five checkpoints are written first (5 GB). Then `geopd measure` runs as a user runs it, and what it leaves
behind (`log.jsonl`, `manifest.json`) is read:

- one checkpoint of every layer in two worker processes: scaling, and the peak memory of a worker;
- of the first layer in one process, with a cold and with a warm decomposition cache: seconds by shape;
- five checkpoints of the first layer: seconds of every checkpoint more;
- the estimate against what it took: in memory, in time as the clock says, and in time on the processor's own clock;
- reading and digesting a file from the disk and from the page cache;
- one matrix in two threads against one: what a thread more is worth, beside what a worker more is worth;
- the float64-SVD protocol (two full SVDs, spectra and angles, nothing else) on one shape, as a ratio.

Processor seconds are what tasks cost whatever else the machine does; wall seconds are told beside them. Whole models
are projected in core-hours: a shape that was measured counts what it took, another one what the measured shape nearest
in cost took, times the ratio of their costs in the engine's cost model.

    python benchmarks/scale.py [--layers N] [--checkpoints N] [--folder DIR] [--json FILE] [--once]

`--once` does the measurement in two worker processes alone; the other needs at least two checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from large_checkpoints import MODELS, Model, write
from rich.console import Console
from rich.table import Table

from geopd.engine.cost import LONG, USUAL, Machine, probe
from geopd.results.task_log import read_log

Shape = tuple[int, int]
WRITTEN = MODELS["Qwen3-8B"]
THREADED = ("k_proj", "q_proj", "up_proj")
PEER = "q_proj"
FIRST = "checkpoint-100"
_BLOCK = 1 << 22


def measure(out: Path, base: Path, run: Path, *options: str) -> dict[str, Any]:
    """Run `geopd measure` to its end: its wall seconds, its log's lines, what it had estimated."""
    command = [sys.executable, "-m", "geopd", "measure", str(base), f"run={run}", "--out", str(out), "--quiet"]
    started = time.perf_counter()
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    estimate = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["estimate"]
    return {"wall": wall, "lines": read_log(out), "estimate": estimate}


def total(result: Mapping[str, Any], key: str = "cpu_seconds") -> float:
    """Sum of a key over all tasks."""
    return math.fsum(line[key] for line in result["lines"])


def by_shape(result: Mapping[str, Any], key: str = "cpu_seconds") -> dict[Shape, float]:
    """Mean of a key over the tasks of each shape."""
    found: dict[Shape, list[float]] = defaultdict(list)
    for line in result["lines"]:
        found[line["rows"], line["cols"]].append(line[key])
    return {shape: mean(values) for shape, values in sorted(found.items())}


def projected(shapes: Mapping[Shape, int], seconds: Mapping[Shape, float], cost: Callable[[Shape], float]) -> float:
    """Seconds of so many matrices of each shape: as measured, or scaled from the measured shape nearest in cost."""
    whole = 0.0
    for shape, count in shapes.items():
        nearest = shape if shape in seconds else min(seconds, key=lambda s: abs(math.log(cost(s) / cost(shape))))
        whole += count * seconds[nearest] * cost(shape) / cost(nearest)
    return whole


def cost_of(checkpoints: int, machine: Machine = USUAL) -> Callable[[Shape], float]:
    """The cost model's seconds of a matrix over so many checkpoints, by shape."""
    from geopd.engine import MeasureOptions, task_seconds
    from geopd.engine.workload import Location, RunSteps, Task
    from geopd.matrices.naming import Role, WeightName

    somewhere = Location(Path(), "")
    runs = (RunSteps("run", "", tuple((i, somewhere) for i in range(checkpoints))),)
    name = WeightName("any", 0, "any", Role.MATRIX)
    return lambda shape: task_seconds(Task(name, shape, somewhere, runs, MeasureOptions(), full=True), machine)


def reading(file: Path) -> dict[str, float]:
    """Bytes a second read and digested as inputs are: from the disk, and from the page cache."""
    found = {}
    for where in ("disk", "page cache"):
        with file.open("rb") as stream:
            if where == "disk":
                os.fsync(stream.fileno())  # what has not been written yet cannot be dropped
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            state, started = hashlib.blake2b(digest_size=16), time.perf_counter()
            while block := stream.read(_BLOCK):
                state.update(block)
        found[where] = file.stat().st_size / (time.perf_counter() - started)
    return found


def _tasks(base: Path, run: Path, module: str) -> list[Any]:
    from geopd.engine import MeasureOptions, make_plan

    return make_plan(base, [run], MeasureOptions(matrices=(f"layers.0.*.{module}",))).all_tasks()


def threads(base: Path, run: Path) -> dict[str, dict[int, float]]:
    """Wall seconds of one matrix of each of three shapes, in one thread and in two."""
    from geopd.engine import executor

    found: dict[str, dict[int, float]] = {}
    for module in THREADED:
        (task,) = _tasks(base, run, module)
        rows, cols = task.shape
        found[f"{rows}x{cols}"] = {}
        for count in (1, 2):
            executor.threads_of = lambda _shape, count=count: count
            found[f"{rows}x{cols}"][count] = executor.perform_task(task).seconds
    return found


def peer(base: Path, run: Path) -> dict[str, Any]:
    """The float64-SVD protocol and the engine's whole task on one matrix, in processor seconds of one thread."""
    import torch
    from spectra import protocol, seconds

    from geopd.engine.executor import perform_task
    from geopd.engine.task import read_matrix

    torch.set_num_threads(1)
    (task,) = _tasks(base, run, PEER)
    theirs, _ = seconds(protocol, read_matrix(task.origin), read_matrix(task.runs[0].steps[0][1]), 512)
    return {"shape": list(task.shape), "protocol": theirs, "geopd": perform_task(task).cpu_seconds}


def whole(folder: Path, base: Path, first: Path) -> dict[str, Any]:
    """Every layer, one checkpoint, two worker processes, a cold cache."""
    return measure(folder / "two", base, first, "--workers", "2", "--cache-dir", str(folder / "cache of two"))


def everything(folder: Path, base: Path, run: Path) -> dict[str, Any]:
    """All that the module's description promises; the measurements by name."""
    first, layer = run / FIRST, ("--matrices", "layers.0.*", "--workers", "1", "--cache-dir")
    return {
        "two": whole(folder, base, first),
        "one": measure(folder / "one", base, first, *layer, str(folder / "cache")),
        "warm": measure(folder / "warm", base, first, *layer, str(folder / "cache")),
        "trajectory": measure(folder / "trajectory", base, run, *layer, "none"),
        "reading": reading(next(base.glob("*.safetensors"))),
        "threads": threads(base, first),
        "peer": peer(base, first),
    }


def figures(found: Mapping[str, Any], checkpoints: int) -> dict[str, Any]:
    """The figures, from what was measured."""
    two = found["two"]
    peak = max(line["peak_bytes"] for line in two["lines"])
    cold, further = by_shape(found.get("one", two)), dict[Shape, float]()
    model = cost_of(1, Machine(**found["machine"]))
    shapes = {shape: {"first": took, "expected_over_measured": model(shape) / took} for shape, took in cold.items()}
    result: dict[str, Any] = {
        "matrices": len(two["lines"]),
        "wall_seconds": two["wall"],
        "cpu_seconds": total(two),
        "peak_bytes": peak,
        "expected_over_measured": {
            "memory": max(line["expected_bytes"] for line in two["lines"]) / peak,
            "seconds of the clock": total(two, "expected_seconds") / total(two, "seconds"),
            "seconds of the processor": sum(model((line["rows"], line["cols"])) for line in two["lines"]) / total(two),
        },
    }
    if "one" in found:
        one, along, warm = found["one"], by_shape(found["trajectory"]), by_shape(found["warm"])
        further = {shape: (along[shape] - cold[shape]) / (checkpoints - 1) for shape in cold}
        for shape, line in shapes.items():
            line |= {"first_warm": warm[shape], "further": further[shape]}
        layers = len(two["lines"]) / len(one["lines"])
        # undisturbed: as if nothing else had taken processors, and two tasks had only shared memory and caches
        result["speed_up"] = {
            "as the clock says": layers * one["wall"] / two["wall"],
            "undisturbed": 2 * layers * total(one) / total(two),
        }
        result |= {key: found[key] for key in ("reading", "threads", "peer")}
    result["shapes"] = {f"{rows}x{cols}": shapes[rows, cols] for rows, cols in shapes}
    result["core_hours"] = {name: core_hours(model, cold, further) for name, model in MODELS.items()}
    return result


def core_hours(model: Model, first: Mapping[Shape, float], further: Mapping[Shape, float]) -> dict[str, float]:
    """Of a whole model: its first checkpoint, and every further one where that was measured."""
    one, two = cost_of(1), cost_of(2)
    found = {"first": projected(model.shapes(), first, one) / 3600}
    if further:
        found["further"] = projected(model.shapes(), further, lambda shape: two(shape) - one(shape)) / 3600
    return found


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What is printed: by shape, as a whole, projected."""
    shapes = Table(
        "shape",
        "first checkpoint, s",
        "cache warm, s",
        "further, s",
        "expected / measured",
        title="seconds of the processor",
    )
    for shape, line in result["shapes"].items():
        cells = (line.get(key) for key in ("first", "first_warm", "further", "expected_over_measured"))
        shapes.add_row(shape, *("" if cell is None else f"{cell:.2f}" for cell in cells))
    about = Table("what", "figure", title=f"{result['matrices']} matrices, two worker processes")
    about.add_row("wall, s", f"{result['wall_seconds']:.0f}")
    about.add_row("processor, s", f"{result['cpu_seconds']:.0f}")
    about.add_row("a worker's peak memory, GB", f"{result['peak_bytes'] / 2**30:.2f}")
    for key, ratio in result["expected_over_measured"].items():
        about.add_row(f"expected / measured, {key}", f"{ratio:.2f}")
    for how, ratio in result.get("speed_up", {}).items():
        about.add_row(f"speed-up by a second worker, {how}", f"{ratio:.2f}")
    for where, rate in result.get("reading", {}).items():
        about.add_row(f"read and digested from the {where}, GB/s", f"{rate / 1e9:.2f}")
    for shape, seconds in result.get("threads", {}).items():
        about.add_row(f"speed-up by a second thread, {shape}", f"{seconds[1] / seconds[2]:.2f}")
    if peer := result.get("peer"):
        shape, ratio = "x".join(map(str, peer["shape"])), peer["protocol"] / peer["geopd"]
        about.add_row(
            f"float64-SVD protocol against everything here, {shape}", f"{peer['protocol']:.0f} s, {ratio:.1f}x"
        )
    models = Table("model", "matrices", "first checkpoint, core-hours", "further, core-hours", title="projected")
    for name, hours in result["core_hours"].items():
        further = f"{hours['further']:.1f}" if "further" in hours else ""
        models.add_row(name, str(sum(MODELS[name].shapes().values())), f"{hours['first']:.1f}", further)
    return [shapes, about, models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="an empty one, which stays; by default a temporary one, removed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go as JSON")
    parser.add_argument("--once", action="store_true", help="measure in two worker processes, and nothing else")
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="geopd-scale-")))
        base, run = write(folder, WRITTEN, asked.layers, asked.checkpoints)
        found = {"two": whole(folder, base, run / FIRST)} if asked.once else everything(folder, base, run)
        found["machine"] = asdict(probe(LONG, clock=time.process_time))
        result = figures(found, asked.checkpoints)
    for table in tables(result):
        Console(width=120).print(table)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
