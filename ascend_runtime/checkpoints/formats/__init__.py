"""Readers of tensor file formats."""
