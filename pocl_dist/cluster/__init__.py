"""From a laptop to a cluster: what a run needs, what a machine has, and how a job is started."""
