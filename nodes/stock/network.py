"""The network of a core MODEL whose blocks run on the ranks: takes core's calls, and asks the ranks for velocities."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ..comfy_bridge import NetworkPass
from . import refusals

CONSUMED = ("denoise_mask",)  # inputs that core's model has already made timesteps of


class Run(Protocol):
    """One run of a sampler (see `model.Run`)."""

    def velocities(self, passes: list[NetworkPass], sigmas: tuple[float, ...], step: int) -> Tensor:
        """The velocities [passes * B, C, T, H, W] of passes in one step."""


class RanksNetwork(torch.nn.Module):
    """Stands where core's model has its network.

    described: core's own network on the meta device, which has names, shapes and settings of all layers, and no
        weights. It is no submodule, because ComfyUI's loader would move its parameters to a device.
    channels: of the latent; inputs with more carry further channels behind them.
    run: the run of a sampler that calls the network; None between runs.
    """

    def __init__(self, described: torch.nn.Module, channels: int):
        super().__init__()
        self.dtype = torch.float32  # of inputs: the ranks convert them to the dtype of the blocks
        self.channels = channels
        self.run: Run | None = None
        network = type(described)
        self._signature = inspect.signature(getattr(network, "_forward", network.forward).__get__(described))
        vars(self)["described"] = described  # last: from here on, its attributes are also those of this module

    def __getattr__(self, name: str) -> Any:
        described = vars(self).get("described")
        if described is None or name in self._modules:
            return super().__getattr__(name)
        return getattr(described, name)

    def __setattr__(self, name: str, value: Any) -> None:
        described = vars(self).get("described")
        if described is not None and name not in vars(self) and hasattr(described, name):
            setattr(described, name, value)  # what a node puts in a layer's place; a run then refuses it by name
        else:
            super().__setattr__(name, value)

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
        """Tensors on the meta device: nodes that attach LoRAs look for the names of layers here."""
        return vars(self)["described"].state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    @torch.compiler.disable
    def forward(self, *args, **kwargs) -> Tensor:
        """Runs the wrappers that nodes such as EasyCache put around core's networks, with the same arguments."""
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments["transformer_options"]
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        return WrapperExecutor.new_class_executor(self._forward, self, wrappers).execute(*call.args, **call.kwargs)

    def _forward(self, *args, **kwargs) -> Tensor:
        inputs = self._signature.bind(*args, **kwargs).arguments
        inputs.update(inputs.pop("kwargs", {}))
        x, timesteps, options = (inputs.pop(name) for name in ("x", "timestep", "transformer_options"))
        refusals.of_options(options)
        given = {name: value for name, value in inputs.items() if name not in CONSUMED and _is_given(value)}
        tensors = refusals.tensors_of(given)
        if x.shape[1] > self.channels:
            tensors["concat"] = x[:, self.channels :]
        if self.run is None:
            raise ValueError(
                "A node runs this MODEL's network outside of a sampler. The ranks can run it only within one: use a "
                "sampler node, or load the model with core's Load Diffusion Model."
            )
        sigmas, sigma = _noise_levels(options)
        skipped = refusals.skipped_blocks(options, vars(self)["described"])
        passes = _passes(options["cond_or_uncond"], x[:, : self.channels], timesteps, tensors, skipped)
        return self.run.velocities(passes, sigmas, step_of(sigmas, sigma)).to(x)


def step_of(sigmas: tuple[float, ...], sigma: float) -> int:
    """Which step of a run evaluates the network at `sigma`: the last one that begins at this noise level or above."""
    began = sum(level >= sigma * (1 - 1e-6) for level in sigmas)
    return min(max(began - 1, 0), max(len(sigmas) - 2, 0))


def _noise_levels(options: dict) -> tuple[tuple[float, ...], float]:
    """The noise levels of the sampler's run, decreasing, and the one of this call."""
    sigma = float(options["sigmas"].max())
    run = options.get("sample_sigmas")
    return (sigma, 0.0) if run is None else tuple(sorted(run.tolist(), reverse=True)), sigma


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _passes(
    branches: list[int], latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], skipped: tuple[int, ...]
) -> list[NetworkPass]:
    """A pass for each of core's conditionings, which arrive joined along the batch."""
    count = len(branches)
    chunks = {name: tensor.chunk(count) for name, tensor in tensors.items()}
    return [
        NetworkPass(
            branch="uncond" if branch else "cond",
            latent=latent,
            timesteps=times,
            inputs={"text" if name == "context" else name: parts[index] for name, parts in chunks.items()},
            skipped=skipped,
        )
        for index, (branch, latent, times) in enumerate(zip(branches, latents.chunk(count), timesteps.chunk(count)))
    ]
