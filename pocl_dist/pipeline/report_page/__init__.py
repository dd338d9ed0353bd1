"""`report.html`: one file that works offline. Each part reads the run's files; none loads torch.

gather.py       what a run holds, bounded; findings.py: what is missing, unfinished or mixed
series.py       metrics.jsonl -> the axis of steps; ranking.py -> scatter and curve; answers.py
run_page.py     facts.py, charts.py and training_charts.py -> values, specifications and data sets
page.py         template, data, library and security policy -> the file; used by `compare` too
"""
