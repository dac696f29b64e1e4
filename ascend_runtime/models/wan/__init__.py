"""The Wan family. `family.py` implements the `Family` interface; the networks are in the modules next to it."""
