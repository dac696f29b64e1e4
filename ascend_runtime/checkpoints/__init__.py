"""Weights on disk: finds tensors in a component's files, and loads them into a network."""
