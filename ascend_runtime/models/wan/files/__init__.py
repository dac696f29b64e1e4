"""Wan on disk: names, configs, LoRAs, pipelines, and similar unsupported networks."""
