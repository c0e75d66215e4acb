"""Benchmarks: protocols, metrics, tasks, runner and reports."""
