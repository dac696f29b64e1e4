"""LoRA files: which parameters they change, by which formula, and how strongly."""
