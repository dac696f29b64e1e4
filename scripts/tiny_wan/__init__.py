"""The embedded tiny Wan: its world of moving shapes, its training, and the reader that evaluates it."""
