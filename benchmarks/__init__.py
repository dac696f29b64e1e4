"""Measurements of the runtime, each beside what it is measured against: `python -m benchmarks NAME --json FILE`."""
