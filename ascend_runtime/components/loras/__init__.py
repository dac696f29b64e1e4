"""LoRAs in the weights of loaded networks, and next to the products of quantized layers."""
