"""The stages of `scripts/train_tiny.py`: prepare, base, distill, card."""
