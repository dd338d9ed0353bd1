"""Processes: process group and DeepSpeed engines of distill, Ray actors of measure and evaluate."""
