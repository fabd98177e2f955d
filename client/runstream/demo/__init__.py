"""The demonstration of `make demo` and `runstream demo`: real scikit-learn models trained in parallel, then queried.

`training` is what any training script looks like (one process, one run), `progress` shows the processes while they
work, `report` reads back what they logged, `session` ties them together. scikit-learn and matplotlib are imported
inside the training processes only.
"""

from __future__ import annotations

__all__: list[str] = []
