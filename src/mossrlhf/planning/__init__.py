"""What a run will need of memory, said before it: models without weights, passes without data."""

from mossrlhf.planning.planner import plan
from mossrlhf.planning.report import MemoryPlan, RoleMemory

__all__ = ["MemoryPlan", "RoleMemory", "plan"]
