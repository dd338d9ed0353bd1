"""The checks, a file per thing that is looked at. Each function: `(case) -> Findings`."""
