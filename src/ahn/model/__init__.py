"""How a memory sits on a transformers model: hooks, the attention function, prompts in chunks, observers."""
