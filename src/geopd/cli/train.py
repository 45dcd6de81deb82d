"""``geopd train``: OPD, RLVR, their mixture and SFT through TRL, from a YAML file and flags."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from geopd.training.planning import MemoryEstimate, ModelSize, TrainPlan

_HELP = """Usage: geopd train {sft,opd,rlvr,mix} --config FILE [--key value ...]
       geopd train {sft,opd,rlvr,mix} --config FILE --dry-run [--processes N] [--json]

Train on demonstrations (sft), on a teacher's judgement of the student's own
responses (opd), on verifiable reward (rlvr), or on both (mix).

  --config FILE    YAML; a flag with the same name as a key wins over it
  --dry-run        resolve everything, print the plan and a memory estimate
  --processes N    devices the plan is made for  [default: those launched]
  --json           print the plan, or the outcome, as JSON

`geopd train opd --help` lists every key. The same command again goes on with
an interrupted run.

Example: geopd train opd --config recipes/tiny/opd.yaml --learning_rate 1e-5
Several GPUs: accelerate launch --config_file recipes/qwen3-8b/fsdp2.yaml
              -m geopd train opd --config recipes/qwen3-8b/opd.yaml"""


def train(context: typer.Context) -> None:
    """Train: SFT, OPD, RLVR and their mixture, configured by a YAML file and flags."""
    words = list(context.args)
    if not words or words[0] in ("--help", "-h"):
        typer.echo(_HELP)
        raise typer.Exit(0 if words else 2)
    paradigm, flags = words[0], words[1:]
    if paradigm.startswith("-"):
        raise ValueError(f"{paradigm} comes too early: `geopd train {{sft,opd,rlvr,mix}} --config FILE ...`")
    if "--help" in flags or "-h" in flags:
        from geopd.training.config_file import help_of

        typer.echo(help_of(paradigm), nl=False)
        return
    dry_run, as_json = _switch(flags, "--dry-run"), _switch(flags, "--json")
    processes, file = _value(flags, "--processes"), _value(flags, "--config")
    if processes is not None and not (dry_run and processes.isdigit() and int(processes) > 0):
        raise ValueError(f"--processes {processes}: give a number of devices, with --dry-run")
    _train(paradigm, flags, file, dry_run, int(processes) if processes else None, as_json)


def _train(
    paradigm: str, flags: list[str], file: str | None, dry_run: bool, processes: int | None, as_json: bool
) -> None:
    from geopd.training.quiet import quiet_training_libraries

    quiet_training_libraries(offline=False)
    from geopd.training.config_file import parse_config
    from geopd.training.run import plan_run, train

    config = parse_config(paradigm, flags, Path(file) if file is not None else None)
    if dry_run:
        plan = plan_run(config, processes)
        typer.echo(json.dumps(plan.as_json(), indent=1) if as_json else "\n".join(_lines(plan)))
        return
    if as_json:
        config.training.disable_tqdm = True
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            outcome = train(config)
    except ImportError as error:  # an option asked for a package that is not here
        raise ValueError(" ".join(str(error).split())) from error
    if config.training.process_index != 0:
        return
    if as_json:
        content = {
            "run": str(outcome.run),
            "updates": outcome.updates,
            "planned": outcome.planned,
            "resumed_from": outcome.resumed_from,
        }
        typer.echo(json.dumps(content))
        return
    done = " already done" if outcome.resumed_from == outcome.updates else ""
    if outcome.updates < outcome.planned:
        typer.echo(f"{outcome.updates} of {outcome.planned} updates{done}, stopped by an alarm -> {outcome.run}")
        typer.echo("the same command without the alarm's `stop` goes on from there")
    else:
        typer.echo(f"{outcome.updates} updates{done} -> {outcome.run}")
    typer.echo(f"next: geopd measure origin {outcome.run} --out results")


def _switch(flags: list[str], name: str) -> bool:
    """Whether a switch is among the flags, which it is taken out of."""
    found = name in flags
    while name in flags:
        flags.remove(name)
    return found


def _value(flags: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``, taken out of the flags."""
    for place, flag in enumerate(flags):
        if flag == name:
            if place + 1 == len(flags):
                raise ValueError(f"{name} needs a value")
            value = flags[place + 1]
            del flags[place : place + 2]
            return value
        if flag.startswith(f"{name}="):
            del flags[place]
            return flag.partition("=")[2]
    return None


def _lines(plan: TrainPlan) -> list[str]:
    rollout = plan.rollout
    shards = plan.memory.sharded(plan.processes)
    kept = ", ".join(map(str, plan.checkpoints[:12])) + (", ..." if len(plan.checkpoints) > 12 else "")
    lines = [
        f"paradigm     {plan.paradigm}: {plan.objective}",
        f"model        {_model(plan.model)}, {plan.model.trained:,} of them trained",
    ]
    if plan.teacher is not None:
        lines.append(f"teacher      {plan.teacher if isinstance(plan.teacher, str) else _model(plan.teacher)}")
    lines.append(f"data         {plan.rows:,} rows")
    if rollout is not None:
        lines.append(
            f"rollout      {rollout['prompts']} prompts, {rollout['responses']} responses of at most "
            f"{rollout['tokens']} tokens, every {rollout['updates']} updates"
        )
    lines += [
        f"updates      {plan.updates} of {plan.sequences} sequences on {plan.processes} devices",
        f"checkpoints  at {kept} ({len(plan.checkpoints)}); resume points "
        + (f"every {plan.resume_every}" if plan.resume_every else "none"),
        *(f"{name:<12} {json.dumps(value)}" for name, value in plan.extras.items()),
        f"memory       {_memory(plan.memory)}",
    ]
    if plan.processes > 1:
        lines.append(f"  sharded    {_memory(shards)} (FSDP2 or ZeRO-3)")
    return [*lines, *(f"note         {note}" for note in plan.notes), "dry run: nothing was trained"]


def _model(size: ModelSize) -> str:
    return f"{size.name}: {size.parameters:,} parameters of {size.bytes_a_weight} bytes, {size.layers} layers"


def _memory(memory: MemoryEstimate) -> str:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "Adam": memory.adam,
        "teacher": memory.teacher,
        "activations": memory.activations,
    }
    listed = " + ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    return f"about {_size(memory.total)} a device: {listed}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
