"""Frozen, validated descriptions of a job's inputs and settings. They do not import torch."""

from .acceleration import (
    AccelerationSpec,
    AttentionCacheSpec,
    BlockCacheSpec,
    Calibration,
    RainFusionSpec,
    StepCacheSpec,
    Window,
)
from .base import Spec
from .cluster import Cluster
from .jobs import OperatorSpec, ProfileSpec, SampleSpec, VideoSize
from .models import DiffusionModelSpec, LoraSpec, TextEncoderSpec, VaeSpec, VisionSpec
from .parallel import ParallelSpec
from .plans import Plan
from .vae_form import VaeForm

__all__ = [
    "AccelerationSpec",
    "AttentionCacheSpec",
    "BlockCacheSpec",
    "Calibration",
    "Cluster",
    "DiffusionModelSpec",
    "LoraSpec",
    "OperatorSpec",
    "ParallelSpec",
    "Plan",
    "ProfileSpec",
    "RainFusionSpec",
    "SampleSpec",
    "Spec",
    "StepCacheSpec",
    "TextEncoderSpec",
    "VaeForm",
    "VaeSpec",
    "VideoSize",
    "VisionSpec",
    "Window",
]
