"""Put the folders of the benchmarks, which are scripts and not a package, on the import path."""

import sys
from pathlib import Path

STUDY = Path(__file__).parents[2] / "benchmarks" / "domain_shift"
sys.path.insert(0, str(STUDY))
