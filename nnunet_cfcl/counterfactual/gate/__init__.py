"""The quality gate of the generator: metrics, verdict, report."""
