"""Plan -> tasks (one task = one matrix over all its checkpoints) -> executor -> the store."""

from geopd.engine.cost import Estimate, estimate
from geopd.engine.measure import MeasureOutcome, measure
from geopd.engine.options import MeasureOptions
from geopd.engine.plan import Plan, RunPlan, make_plan, task_cost

__all__ = [
    "Estimate",
    "MeasureOptions",
    "MeasureOutcome",
    "Plan",
    "RunPlan",
    "estimate",
    "make_plan",
    "measure",
    "task_cost",
]
