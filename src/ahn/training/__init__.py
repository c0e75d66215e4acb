"""Self-distillation: the window schedule, losses from hidden states, one step; `run` is `ahn train`."""

from ahn.training.distillation import Distillation, check_head, distillation_loss
from ahn.training.schedule import WindowDraw, WindowSchedule

__all__ = ["Distillation", "WindowDraw", "WindowSchedule", "check_head", "distillation_loss"]
