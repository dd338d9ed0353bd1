"""How hard each example is for the student before training (POCL section 3.1).

`signals/` says what is measured, `work` cuts the rows into batches and shards, `worker` runs them
on a model inside an actor, `fusion` makes one ranking of the signals.
"""
