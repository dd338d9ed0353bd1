"""pocl_dist: distil a large language model into a small one with a curriculum (POCL)."""

__version__ = "0.1.0"
