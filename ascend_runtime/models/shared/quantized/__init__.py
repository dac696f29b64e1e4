"""Linear layers that keep their weights in fewer bits, and what LoRAs add to their products."""
