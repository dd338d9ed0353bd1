# shellcheck shell=bash disable=SC2034
# Sourced: how a command gets into a container. Here: there is none.

srun_container=()                  # more options for srun
in_container=()                    # before a command that srun starts
on_this_node=()                    # before a command of the batch script
