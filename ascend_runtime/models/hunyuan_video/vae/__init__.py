"""The HunyuanVideo VAE: the whole plane over ranks, and the published tiles dealt to ranks."""
