"""HunyuanVideo's text encoders: a Llama without its last two layers, and CLIP's text model."""
