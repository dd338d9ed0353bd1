"""The parts of `pocl-dist compare`, in the order in which it uses them.

request      what the command line asks for
arms         the baselines and, per method, plain KD and KD + POCL, as changed config keys
ablations    the controls of `--ablate`, likewise
visits       sample visits of every arm; unequal ones are refused
folders      where a run of the comparison lies, and its config
state        what a run directory holds: done, trained, unfinished, failed, mixed or missing
inner        a step of a run inside this process, under that run's own lock
shared       difficulty, answers of the teacher and cache, made once and linked into every run
children     trainings as `pocl-dist run`, each a process of its own that a stop reaches
rates        the learning rate of an arm, by dev
rounds       which runs are trained and evaluated next
scores       the answers of a run, per example
intervals    mean, standard deviation, bootstrap interval
differences  what an arm gains over another
tabulate     comparison.json
tables       comparison.md, and what is printed
nested       `verify` of a comparison

To add a method: an entry in `arms.METHODS`; to add an ablation: one in `ablations.ABLATIONS`.
"""
