"""`report.html`: one file that works offline. Each part reads the run's files; none loads torch.

gather.py      all of it for one run: facts, findings, charts -> the template's values
findings.py    what is missing, unfinished or mixed, and which key or command mends it
series.py      metrics.jsonl -> the time axis; ranking.py -> scatter and curve; answers.py -> texts
charts.py      Vega-Lite specifications over named data sets; the library draws them in the browser
page.py        template, data, library and security policy -> the file; used by `compare` too
"""
