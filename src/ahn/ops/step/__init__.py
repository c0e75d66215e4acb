"""One decoding step of a layer: `reference` in plain torch, kernels beside it, `operator` chooses."""
