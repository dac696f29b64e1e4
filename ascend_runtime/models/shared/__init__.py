"""What networks of all families share: the block stack, conditioning, text, VAEs in tiles. Needs torch."""
