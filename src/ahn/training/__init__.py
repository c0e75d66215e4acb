"""Self-distillation: the window schedule, losses from hidden states, one step, a compact loop; `run` is `ahn train`."""

from ahn.training.distill import Distillation, check_head, distillation_loss
from ahn.training.loop import StepLog, distill
from ahn.training.schedule import WindowDraw, WindowSchedule

__all__ = ["Distillation", "StepLog", "WindowDraw", "WindowSchedule", "check_head", "distill", "distillation_loss"]
