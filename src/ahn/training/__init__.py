"""Self-distillation: window schedule, losses from hidden states, one step, a compact loop."""
