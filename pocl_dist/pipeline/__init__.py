"""The steps: measure, plan, distill, evaluate, report. The only place where the parts meet.

Each step reads the files of the step before and writes its own once; no step imports another.
"""
