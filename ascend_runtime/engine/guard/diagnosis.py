"""Says why values that the network computed are not finite: which pass, and whether it is its inputs, a weight, an
accelerator, or the range of the dtype. Nothing here runs before such values were found, so it may take its time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...components import DiffusionModel, TextEncoders
from ...errors import coded_error
from ...models.shared.block_stack import BlockStack, Pass
from ...ops.finite import is_finite
from ...parallel.fsdp import own_part
from ...parallel.mesh import all_reduce_max, all_reduce_sum, world_size
from ...specs import TextEncoderSpec
from ..generation import BRANCHES, Generation, NetworkCall
from ..sampling import SolverStep

BAD = "NaN or infinite values"
COMPARE = "start with ASCEND_RUNTIME_OPERATORS=torch to compare: if that is right, an operator of the card is wrong"


@dataclass(frozen=True)
class Evaluation:
    """The passes of a step, and the velocities that they gave."""

    calls: Sequence[NetworkCall]
    step: SolverStep
    velocities: Sequence[Tensor]


class Watching(Pass):
    """A pass that computes everything, and notes the first block with an output that is not finite.

    first: its number; -1: what enters the blocks is not finite; None: what leaves them is finite. largest: the largest
    absolute value that entered the block, or the last one.
    """

    first: int | None = None
    largest: float = 0.0
    count: int = 0

    def blocks(self, stack: BlockStack, tokens: Tensor) -> Tensor:
        self.first, self.count = None if is_finite(tokens) else -1, stack.count
        for number in range(stack.count):
            if self.first is None:
                self.largest = float(torch.stack(torch.aminmax(tokens)).abs().max())
            tokens = stack.run(number, tokens)
            if self.first is None and not is_finite(tokens):
                self.first = number
        return tokens


class Diagnosis:
    """Of one evaluation, after at least one rank has found values that are not finite in what it led to.

    together: whether all ranks make it, and so may compute and compare; else this rank looks at what it has.
    """

    def __init__(self, generation: Generation, model: DiffusionModel, evaluation: Evaluation, together: bool):
        self._generation, self._model, self._made, self._together = generation, model, evaluation, together

    def error(self, total: int) -> ValueError:
        """The reason. total: the number of steps."""
        calls, number = self._made.calls, self._made.step.number
        bad = [call for call, n in zip(calls, self._agreed(map(_not_finite, self._made.velocities))) if n]
        where = f"Step {number + 1} of {total}"
        if not bad:
            text = f"the solver's result has {BAD}, though the network's is finite. Its sigmas may lie too close"
            return coded_error("AV-1601", f"{where}: {text} to each other: take another schedule or solver.")
        prompts = " and ".join(dict.fromkeys(f"{BRANCHES.get(call.branch, call.branch)} prompt" for call in bad))
        expert = self._model.name_at(calls[0].timestep).replace("_", "-")
        where += f" ({prompts})" if self._model.low_noise is None else f" ({expert} expert, {prompts})"
        return self._of_inputs(where, bad) or self._of_weights(where) or self._of_passes(where, bad)

    def _of_inputs(self, where: str, calls: Sequence[NetworkCall]) -> ValueError | None:
        """What every rank has alike: conditioning and latent, in the dtype of the blocks."""
        given = [{"latent": call.latent.to(self._model.dtype)} | _tensors_of(call.context) for call in calls]
        bad = [(name, x) for tensors in given for name, x in tensors.items() if not is_finite(x)]
        if not any(self._agreed([len(bad)])):
            return None
        name, tensor = bad[0] if bad else ("latent", torch.zeros(0))
        text = f"the network's input {name!r} has {BAD} in {self._dtype}, {_count(tensor)} of {tensor.numel():,}"
        return coded_error("AV-1603", f"{where}: {text}. {self._wider()}")

    def _of_weights(self, where: str) -> ValueError | None:
        call = self._made.calls[0]
        name = self._model.name_at(call.timestep)
        bad = bad_weights(self._model.expert_at(call.timestep), self._together)
        if not bad:
            return None
        adapter = self._model.adapters[name]
        place = next((adapter.places[one] for one in bad if one in adapter.places), None)
        if adapter.in_use:
            cure = "The LoRAs in use may exceed its dtype: set their strength lower, or the model's dtype to bfloat16."
        else:
            cure = again("its file" if place is None else str(place.shard))
        return coded_error("AV-1602", f"{where}: the network has {BAD} in {listed(bad)}. {cure}")

    def _of_passes(self, where: str, bad: Sequence[NetworkCall]) -> ValueError:
        """Computes the passes again, without accelerators, if all ranks can."""
        made = f"{where}: the network computes {BAD} from finite inputs and weights"
        if not (self._together or world_size() == 1):
            return coded_error("AV-1601", f"{made}. {self._wider()}")
        watched = {call.branch: Watching() for call in self._made.calls}
        step = SolverStep(self._made.step.number, self._made.calls[-1].timestep)
        velocities = self._generation.velocity(self._made.calls, step, instead=watched)
        kinds = self._generation.acceleration.spec.kinds
        if kinds and not any(self._agreed(map(_not_finite, velocities))):
            return coded_error("AV-1604", f"{where}: {BAD}, and none without {_names(kinds)}. {cure_of(kinds)}")
        return coded_error("AV-1601", f"{made}{_place(watched, bad)}. {self._wider()}")

    def _agreed(self, numbers: Iterable[float]) -> list[float]:
        """The sums over all ranks, or this rank's numbers."""
        numbers = [float(number) for number in numbers]
        return all_reduce_sum(torch.tensor(numbers)) if self._together else numbers

    @property
    def _dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def _wider(self) -> str:
        """What to do about values that the dtype does not hold, or that it should."""
        loras = any(adapter.in_use for adapter in self._model.adapters.values())
        cures = ["set the LoRAs' strength lower"] if loras else []
        if self._model.dtype == torch.float16:
            cures.insert(0, "load the model in dtype bfloat16, which has float32's range (float16 ends at 65504)")
        else:
            cures.append(f"{self._dtype} has float32's range, so check the model's files")
        if self._model.device.type == "npu":
            cures.append(COMPARE)
        text = "; ".join(cures)
        return f"{text[0].upper()}{text[1:]}."


def check_encoded(results: Mapping[str, Tensor], loaded: TextEncoders, spec: TextEncoderSpec) -> None:
    """Raises ValueError, which names the result, if text encoders have computed values that are not finite."""
    bad = next((name for name, tensor in results.items() if not is_finite(tensor)), None)
    if bad is None:
        return
    for part, encoder in loaded.encoders.items():
        if weights := bad_weights(encoder.model, together=False):
            raise coded_error("AV-1602", f"The {part} has {BAD} in {listed(weights)}. {again(spec.path)}")
    cure = "Its dtype is float16, which ends at 65504: set dtype to bfloat16, or to auto."
    if spec.dtype != "float16":
        cure = f"Its dtype has float32's range: check the files at {spec.path}; compare with placement cpu."
    raise coded_error("AV-1605", f"The text encoder's result {bad!r} has {BAD}. {cure}")


def bad_weights(network: nn.Module, together: bool = True) -> list[str]:
    """The names of the parameters with values that are not finite, on any rank if all ask together."""
    parameters = dict(network.named_parameters())
    flags = torch.tensor([float(not _weight_is_finite(own_part(one))) for one in parameters.values()])
    found = all_reduce_sum(flags) if together else flags.tolist()
    return [name for name, flag in zip(parameters, found) if flag]


def again(file: str) -> str:
    """What to do about a weight that is not finite, as the reader of files lets none pass."""
    return f"It was finite when it was read. Run Ascend Free Memory and try again; if it returns, check {file}."


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more weights"


def _weight_is_finite(weight: Tensor) -> bool:
    return is_finite(weight.float() if weight.is_floating_point() and weight.itemsize == 1 else weight)


def _not_finite(tensor: Tensor) -> bool:
    return not is_finite(tensor)


def _count(tensor: Tensor) -> str:
    return f"{int((~tensor.isfinite()).sum()):,}"


def _tensors_of(context: object) -> dict[str, Tensor]:
    """The tensors of a branch's conditioning, by name, also of what it holds; not what a network keeps there."""
    found: dict[str, Tensor] = {}
    for name, value in vars(context).items():
        if isinstance(value, Tensor) and not name.startswith("_"):
            found[name] = value
        elif hasattr(value, "__dict__"):
            found |= _tensors_of(value)
    return found


def _place(watched: dict[str, Watching], bad: Sequence[NetworkCall]) -> str:
    """Where the first of the passes leaves the range, on any rank. Collective."""
    passes = [watched[call.branch] for call in bad]
    count = all_reduce_max(max(one.count for one in passes))
    first = -all_reduce_max(-min(count if one.first is None else one.first for one in passes))
    largest = all_reduce_max(int(max(one.largest for one in passes)))
    if first < 0:
        return ", before its first block"
    place = "behind its last block" if first == count else f"in block {first + 1} of {count}"
    return f", {place}; what enters there reaches {largest:,}"


def _names(kinds: dict[str, str]) -> str:
    return " and ".join(f"{kind.replace('_', ' ')} {method}".strip() for kind, method in kinds.items())


def cure_of(kinds: dict[str, str]) -> str:
    """What to change of the accelerators in use."""
    cures = {
        "step_cache": "lower the step cache's threshold or interval",
        "block_cache": "lower the block cache's interval",
        "attention_cache": "lower the attention cache's interval",
        "rainfusion": "lower RainFusion's sparsity",
    }
    text = "; ".join(cure for kind, cure in cures.items() if kind in kinds)
    return f"{text[0].upper()}{text[1:]}, or sample without it."
