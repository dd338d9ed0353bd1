"""What steps say and show: the names of `display/` that all of them use."""

from __future__ import annotations

from pocl_dist.display.output import say, warn
from pocl_dist.display.rows import RowProgress

__all__ = ["RowProgress", "say", "warn"]
