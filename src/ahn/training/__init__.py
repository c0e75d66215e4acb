"""Self-distillation: the window schedule, losses from hidden states, one step, and a compact loop."""

from ahn.training.distill import Distillation, check_head, distillation_loss
from ahn.training.loop import StepLog, distill
from ahn.training.schedule import WindowDraw, WindowSchedule

__all__ = ["Distillation", "StepLog", "WindowDraw", "WindowSchedule", "check_head", "distill", "distillation_loss"]
