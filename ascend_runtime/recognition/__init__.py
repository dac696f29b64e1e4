"""What files hold: which network of which family, in which layout; and LoRA files."""
