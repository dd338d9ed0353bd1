"""`pocl-dist doctor`: what would keep a run from starting, found in seconds, before it queues.

A check is a function in checks/ that looks at a `Case` and yields Findings, and an entry of
`registry.CHECKS` (docs/doctor.md shows them as a table). Neither torch nor weights are loaded; what
needs a GPU is asked of a child process.
"""
