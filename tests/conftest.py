"""Shared set-up: one torch thread a process, because test processes run side by side."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tables leave columns out where the terminal is narrow; runners of tests set its width.
os.environ.pop("COLUMNS", None)
