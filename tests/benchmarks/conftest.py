"""Benchmarks are commands, not a package: their folders are put on the path as running them does."""

import sys
from pathlib import Path

STUDY = Path(__file__).parents[2] / "benchmarks" / "domain_shift"
sys.path.insert(0, str(STUDY))
