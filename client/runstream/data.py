"""`runstream.data`: data sets for `log_input`, from what a program holds."""

from __future__ import annotations

from .dataset import describe, from_numpy, from_pandas
from .entities import Dataset

__all__ = ["Dataset", "describe", "from_numpy", "from_pandas"]
