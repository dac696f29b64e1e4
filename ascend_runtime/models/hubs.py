"""Where published models can be had."""

HUBS = "from Hugging Face or ModelScope"
