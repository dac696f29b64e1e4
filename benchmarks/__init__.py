"""Benchmarks of the runtime, each with its baseline: `python -m benchmarks NAME --json FILE`."""
