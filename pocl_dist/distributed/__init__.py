"""Several processes: the process group and DeepSpeed engines of distill, the Ray actors of measure and evaluate."""
