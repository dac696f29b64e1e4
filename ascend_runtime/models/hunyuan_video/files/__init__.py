"""HunyuanVideo on disk: names, configs, LoRAs, pipelines."""
