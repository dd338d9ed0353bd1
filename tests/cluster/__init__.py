"""Real schedulers, launchers and several hosts on one machine, as root: `make cluster-test`."""
