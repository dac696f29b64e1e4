"""The Wan family. `family.py` is its door; the networks stand next to it."""
