"""What people, and programs that watch, see of a run: lines, live bars, JSON; rates and ETAs.

`output.py` is the one place that writes to stdout; `training.py` and `rows.py` show train steps and
passes over rows through it.
"""
