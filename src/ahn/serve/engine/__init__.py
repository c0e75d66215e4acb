"""The engine: many conversations with one model, read and written together, kept and found again."""
