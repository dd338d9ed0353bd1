"""From one machine to many: job files of schedulers and launchers; no torch, ray or deepspeed."""
