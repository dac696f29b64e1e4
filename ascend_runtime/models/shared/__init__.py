"""Shared by the networks of all families: the block stack, conditioning, text, tiled VAEs. Needs torch."""
