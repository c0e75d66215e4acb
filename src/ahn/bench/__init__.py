"""Speed and memory of full attention, sinks + window and every AHN, side by side, against what the machine can do.

`runner` goes through rows (measurement, method, context, batch); one file is one measurement; `roofline` counts the
work that cannot be avoided, `ceilings` measures how fast the machine could do it.
"""
