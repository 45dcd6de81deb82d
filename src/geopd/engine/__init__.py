"""Plan -> tasks (one task = one matrix over all its checkpoints) -> executor -> the store."""

from geopd.engine.cost import Estimate, Machine, estimate, probe, task_bytes, task_cost, task_seconds
from geopd.engine.decomposition_cache import DecompositionCache
from geopd.engine.execution import Execution, Outcome
from geopd.engine.measure import MeasureOutcome, measure
from geopd.engine.merging import MergeOutcome, merge
from geopd.engine.options import MeasureOptions
from geopd.engine.plan import Plan, make_plan
from geopd.engine.run_plan import RunPlan
from geopd.engine.shards import Shard

__all__ = [
    "DecompositionCache",
    "Estimate",
    "Execution",
    "Machine",
    "MeasureOptions",
    "MeasureOutcome",
    "MergeOutcome",
    "Outcome",
    "Plan",
    "RunPlan",
    "Shard",
    "estimate",
    "make_plan",
    "measure",
    "merge",
    "probe",
    "task_bytes",
    "task_cost",
    "task_seconds",
]
