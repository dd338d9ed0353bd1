"""`pocl-dist estimate`: what a run will need in memory, time and disk, before anything is started.

Loads no torch and no weights: models are known by their config.json and the headers of their files.
`shapes` and `model_files` say what the models are, `workload` what the rows are, `devices` and
`communication` what the cluster can do; `memory`, `flops` and `step_time` put these together;
`fitting`, `stages` and `what_if` answer the questions; `report` prints.
"""
