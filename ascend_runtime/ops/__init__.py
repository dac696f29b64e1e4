"""Operators with one signature each, whatever the device: the only place that knows what a device does best."""

from .attention import attention
from .norm import modulated_layer_norm, rms_norm
from .rotary import rotary, rotary_table

__all__ = ["attention", "modulated_layer_norm", "rms_norm", "rotary", "rotary_table"]
