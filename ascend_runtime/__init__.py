"""Ascend Video runtime: a group of ranks that loads, encodes, samples and decodes video models.

Usable from plain Python; knows nothing of ComfyUI. Names are resolved on first use, so that a rank's
interpreter reaches its own code before it pays for torch.
"""

from importlib import import_module

_HOMES = {
    "Runtime": "client",
    "Result": "submission",
    "RankDied": "launcher",
    "RankError": "submission",
    "JobCancelled": "submission",
    "Conditioning": "protocol",
    "DiffusionModelSpec": "specs",
    "LoraSpec": "specs",
    "TextEncoderSpec": "specs",
    "VaeSpec": "specs",
    "ParallelSpec": "specs",
    "SampleSpec": "specs",
    "OperatorSpec": "specs",
    "ProfileSpec": "specs",
    "AccelerationSpec": "acceleration",
    "AttentionCacheSpec": "acceleration",
    "BlockCacheSpec": "acceleration",
    "StepCacheSpec": "acceleration",
    "RainFusionSpec": "acceleration",
    "VideoSize": "specs",
    "Defaults": "families.defaults",
    "model_defaults": "families.defaults",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
