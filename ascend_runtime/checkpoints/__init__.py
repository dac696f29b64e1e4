"""Weights on disk: where a component's files lie, and how they are read into a network."""
