"""The HunyuanVideo family (1.0): text-to-video and image-to-video. `family.py` is its door."""
