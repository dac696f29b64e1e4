"""Model calls for samplers outside of the ranks: what they are given, and which of it the ranks hold already."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..wire.messages import MAX_ENTRIES, CallSetting, ModelPass, SamplerRun
from .arguments import LATENT_AXES, check_kind, check_tensor

GUIDANCE_BRANCHES = ("cond", "uncond")
MOST_HELD = 2 * 2**30  # bytes of inputs that the ranks hold; those of the running call are not limited


@dataclass(frozen=True)
class NetworkPass:
    """One pass through the network.

    branch: of guidance, "cond" or "uncond". latent [B,C,T,H,W]: normalised, without further channels.
    timesteps [B], or [B, T] with one for each latent frame: in 0..1000.
    inputs: what stays the same from call to call, by name (see `models.shared.conditioning.Inputs`).
    skipped: the blocks that are left out, in one numbering whatever their kinds.
    """

    branch: str
    latent: Tensor
    timesteps: Tensor
    inputs: Mapping[str, Tensor]
    skipped: tuple[int, ...] = ()


class HeldByRanks:
    """What the ranks hold: tensors, by number, and the setting of the last call. What equals it is not sent again.

    Tensors stay for the run that uses them and the next one, as two runs in a row often have the same texts. A rank
    keeps the whole message in which one came, with its latent, so old ones would take more than their own bytes.

    fresh: whether the ranks may hold something else, and must forget it before they get the next.
    pause: the longest one between reports of the run's calls, in seconds: a step that takes minutes is no silence.
    """

    def __init__(self, most: int = MOST_HELD):
        self.fresh, self.pause = True, 0.0
        self._setting: CallSetting | None = None
        self._most = most
        self._numbers = itertools.count(1)  # never used twice, also after `forget`
        self._held: dict[int, Tensor] = {}  # the last used is last
        self._used: set[int] = set()  # in this run
        self._used_before: set[int] = set()  # in the run before

    def forget(self) -> None:
        """All numbers become invalid, as ranks may have lost what they stand for."""
        self.fresh, self._setting = True, None
        self._held.clear()
        self._used.clear()
        self._used_before.clear()

    @contextmanager
    def sent(self) -> Iterator[None]:
        """The context of a call that sends new tensors. If it fails, it is not known which ranks have them."""
        try:
            yield
        except BaseException:
            self.forget()
            raise
        self.fresh = False

    def new_setting(self, setting: CallSetting) -> CallSetting | None:
        """The setting, if it is not that of the last call."""
        if setting == self._setting:
            return None
        self._setting, self.pause = setting, 0.0
        self._used_before, self._used = self._used, set()
        return setting

    def number(self, tensor: Tensor, new: dict[int, Tensor]) -> int:
        """The number of a tensor; added to `new` if the ranks do not hold one that equals it."""
        tensor = tensor.detach().cpu()
        number = self._number_of_equal(tensor)
        if number is None:
            number = next(self._numbers)
            new[number] = held = tensor.clone()  # the caller may write to its own
        else:
            held = self._held.pop(number)
        self._held[number] = held
        self._used.add(number)
        return number

    def _number_of_equal(self, tensor: Tensor) -> int | None:
        for number, held in reversed(self._held.items()):
            if held.shape == tensor.shape and held.dtype == tensor.dtype and torch.equal(held, tensor):
                return number
        return None

    def dropped(self, needed: set[int]) -> tuple[int, ...]:
        """Numbers that the ranks may forget: those that neither this run nor the one before has used, and, if the
        others take too much memory, those that were not used for longest."""
        used = self._used | self._used_before
        gone = [number for number in self._held if number not in used]
        total = sum(tensor.nbytes for number, tensor in self._held.items() if number not in gone)
        for number, tensor in self._held.items():
            if total <= self._most:
                break
            if number not in needed and number not in gone:
                gone.append(number)
                total -= tensor.nbytes
        for number in gone:
            del self._held[number]
        return tuple(gone)


@dataclass
class Packed:
    """The passes of a call as a message has them: see `wire.messages.Velocity`."""

    setting: CallSetting | None
    latents: list[Tensor] = field(default_factory=list)
    passes: list[ModelPass] = field(default_factory=list)
    held: dict[int, Tensor] = field(default_factory=dict)
    drop: tuple[int, ...] = ()
    fresh: bool = False


def packed(passes: Sequence[NetworkPass], setting: CallSetting, held: HeldByRanks) -> Packed:
    """Passes with numbers in the place of their inputs. Latents that are equal are sent once."""
    made = Packed(held.new_setting(setting), fresh=held.fresh)
    for one in passes:
        made.passes.append(
            ModelPass(
                branch=one.branch,
                latent=_place(one.latent, made.latents),
                timesteps=one.timesteps.detach().float().cpu(),
                inputs={name: held.number(tensor, made.held) for name, tensor in one.inputs.items()},
                skipped=tuple(one.skipped),
            )
        )
    made.drop = held.dropped({number for one in made.passes for number in one.inputs.values()})
    return made


def _place(latent: Tensor, latents: list[Tensor]) -> int:
    """Where a latent is in the list, to which it is added if no other one equals it."""
    latent = latent.detach().cpu()
    for place, other in enumerate(latents):
        if other.dtype == latent.dtype and torch.equal(other, latent):
            return place
    latents.append(latent)
    return len(latents) - 1


def check_call(passes: Any, run: Any, step: Any) -> None:
    """Raises ValueError for passes that cannot be one call, or a step that is not of the run."""
    check_kind("run", run, SamplerRun)
    if len(run.sigmas) < 2 or not all(map(math.isfinite, run.sigmas)):
        raise ValueError(f"The run's sigmas are {list(run.sigmas)}; give at least two finite numbers.")
    if type(step) is not int or not 0 <= step < len(run.sigmas) - 1:
        raise ValueError(f"step is {step!r}; the run has the steps 0 to {len(run.sigmas) - 2}.")
    check_kind("passes", passes, list, tuple)
    if not passes:
        raise ValueError("passes is empty; give at least one.")
    for one in passes:
        check_kind("a pass", one, NetworkPass)
        _check_pass(one)
    shapes = {tuple(one.latent.shape) for one in passes}
    if len(shapes) > 1:
        raise ValueError(f"The latents have the shapes {sorted(shapes)}; those of one call must be equal.")


def _check_pass(one: NetworkPass) -> None:
    if one.branch not in GUIDANCE_BRANCHES:
        raise ValueError(f"The branch of a pass is {one.branch!r}; it can be {' or '.join(GUIDANCE_BRANCHES)}.")
    check_tensor("latent", one.latent, LATENT_AXES)
    check_tensor("timesteps", one.timesteps)
    batch, _, frames, *_ = one.latent.shape
    if tuple(one.timesteps.shape) not in ((batch,), (batch, frames)):
        raise ValueError(
            f"The timesteps have the shape {list(one.timesteps.shape)}; for this latent it must be [{batch}], or "
            f"[{batch}, {frames}] with one for each latent frame."
        )
    check_kind("inputs", one.inputs, Mapping)
    if len(one.inputs) > MAX_ENTRIES:
        raise ValueError(f"A pass has {len(one.inputs)} inputs; at most {MAX_ENTRIES} can be given.")
    for name, tensor in one.inputs.items():
        check_kind("the name of an input", name, str)
        check_tensor(name, tensor, floats=False)
