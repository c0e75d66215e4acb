"""Exact attention: sinks and window for a chunk of queries, spans for training, parts joined by their log-sum-exps."""
