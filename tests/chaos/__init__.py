"""The chaos suite: real runs that are killed, frozen, filled up and damaged, and then compared.

    python -m tests.chaos                    all of them (`make chaos`), into docs/reliability.md
    python -m tests.chaos kill_training      some of them, table printed only
    CHAOS_SCALE=0.1 CHAOS_SEED=7 ...         fewer faults, another seed

To add an experiment: a file with `run(lab: Lab) -> Result`, and an entry in experiments.py. Every
experiment compares with an undisturbed run, byte by byte, and leaves its folder when it failed.
"""
