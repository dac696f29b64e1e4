"""The families of video models, and what they share."""
