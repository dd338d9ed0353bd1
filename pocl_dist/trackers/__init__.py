"""Trackers besides `metrics.jsonl`, through their own libraries. None is required; rank 0 sends.

To add one: a file with a class as `base.Tracker` says, whose constructor opens the run; an entry in
`registry.TRACKERS`; its name in `config.LogConfig.trackers`. It runs in a thread of `sender.py`, so
it may wait and fail as it likes: a training neither stands still nor ends because of it.
"""
