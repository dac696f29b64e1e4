"""Accelerators: attention, block and step caches, and sparse attention. Each reports what it skipped."""
