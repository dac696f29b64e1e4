"""Recognises model files: which network of which family they hold, in which layout; and reads LoRA files."""
