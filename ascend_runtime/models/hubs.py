"""Where published models can be downloaded."""

HUBS = "from Hugging Face or ModelScope"
