"""Ascend Video runtime: a group of ranks that loads, encodes, samples and decodes video models.

It does not depend on ComfyUI. Names are imported on first use, so that importing the package does not import torch.
"""

from importlib import import_module

_HOMES = {
    "Runtime": "client.runtime",
    "Result": "client.submission",
    "RankDied": "client.group",
    "RankError": "client.submission",
    "JobCancelled": "client.submission",
    "Conditioning": "wire.messages",
    "Cluster": "specs",
    "read_cluster": "specs.cluster",
    "DiffusionModelSpec": "specs",
    "LoraSpec": "specs",
    "TextEncoderSpec": "specs",
    "VaeSpec": "specs",
    "ParallelSpec": "specs",
    "SampleSpec": "specs",
    "OperatorSpec": "specs",
    "ProfileSpec": "specs",
    "AccelerationSpec": "specs.acceleration",
    "AttentionCacheSpec": "specs.acceleration",
    "BlockCacheSpec": "specs.acceleration",
    "StepCacheSpec": "specs.acceleration",
    "RainFusionSpec": "specs.acceleration",
    "VideoSize": "specs",
    "Defaults": "models.defaults",
    "model_defaults": "recognition.defaults",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
