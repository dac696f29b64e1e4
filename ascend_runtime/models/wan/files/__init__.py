"""Wan on disk: names, configs, LoRAs, pipelines, and files that are close to it."""
