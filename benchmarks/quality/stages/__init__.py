"""The stages of `benchmarks/quality/run.py`: prepare, base, distill, evaluate, report; and `card` of ahn-tiny."""
