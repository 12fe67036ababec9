"""The scripts import one another as they do when they are run: from their own folder."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / folder) for folder in ("", "training", "planner")]
