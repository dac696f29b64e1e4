"""alpha and rank of a LoRA whose tensors do not say them: in the header (diffusers), or in PEFT's adapter_config.json.

A layer's change is scaled by alpha / rank, or alpha / sqrt(rank) where use_rslora is set (Kalajdzievski, arXiv
2312.03732), as PEFT does (peft/tuners/lora/layer.py). alpha_pattern and rank_pattern have layers' own, by their names
or ends of these; the first that fits counts. What else PEFT's configuration may ask for is refused, as the sum would be
another. ss_network_alpha in kohya's header is not read: kohya's software takes the rank where a file has no alpha.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.bounded import parse_json, read_bounded
from ..checkpoints.faults import usable
from ..checkpoints.formats.tensor_files import TensorFile

IN_THE_HEADER = "lora_adapter_metadata"  # diffusers/loaders/lora_base.py
PEFTS_CONFIG, PEFTS_WEIGHTS = "adapter_config.json", "adapter_model"  # the second before a suffix
MAX_BYTES = 4 * 2**20  # of a configuration
MAX_PATTERNS = 10_000
PATTERN = re.compile(r"^(\^|\.\*(\\?\.)?)?([\w\-]+(\\?\.[\w\-]+)*)\$?$")
# How PEFT may begin with matrices whose product is 0: others change the weights of the model, too.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
CANNOT = ("use_dora", "use_qalora", "fan_in_fan_out", "layer_replication", "use_bdlora")


@dataclass(frozen=True)
class AdapterConfig:
    """where: of whom it is, in an error's words. alphas, ranks: of layers that have their own, by name or its end; a
    name that begins with ^ is a whole one."""

    where: str
    alpha: float
    rank: int
    alphas: dict[str, float]
    ranks: dict[str, float]
    rslora: bool

    def scale(self, names: tuple[str, ...], rank: int) -> float:
        """By which the product of two matrices of this rank is to be multiplied. names: of their layer.

        Raises ValueError where the matrices have another rank than was said of them.
        """
        said = _own(self.ranks, names, self.rank)
        if said != rank:
            raise ValueError(
                f"{self.where} says that {names[0]} has the rank {said:g}, but its matrices have {rank}: how strong it "
                "is to be cannot be known. Take the file as its trainer has written it."
            )
        return _own(self.alphas, names, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def config_file(path: Path) -> Path | None:
    """PEFT's configuration of a LoRA file; None where there is none, or the file is not named as PEFT names it."""
    found = path.with_name(PEFTS_CONFIG)
    return found if path.stem == PEFTS_WEIGHTS and found.is_file() else None


def adapter_config(file: TensorFile, section: str) -> AdapterConfig | None:
    """What a file says of its layers for a part of a diffusers pipeline ("transformer"); None where it says nothing.

    Raises ValueError for what cannot be understood, or asks for another sum than a LoRA's.
    """
    header, config = file.header.get(IN_THE_HEADER), config_file(file.path)
    if header is not None:
        where = f"{file.path}: the header's {IN_THE_HEADER}"
        with usable(file.path, f"the header's {IN_THE_HEADER}"):
            return _config(where, _section(_object(header), section))
    if config is None:
        return None
    with usable(config, "it as PEFT's configuration"):
        return _config(str(config), _object(read_bounded(config, MAX_BYTES)))


def _object(text: str | bytes) -> dict[str, Any]:
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _section(content: dict[str, Any], section: str) -> dict[str, Any]:
    """diffusers puts the part of the pipeline before each name, unless the model itself was asked to save."""
    if "r" in content or "lora_alpha" in content:
        return content
    own = {key.removeprefix(f"{section}."): value for key, value in content.items() if key.startswith(f"{section}.")}
    if content and not own:
        raise ValueError(f"it says nothing of the {section}")
    return own


def _config(where: str, said: dict[str, Any]) -> AdapterConfig | None:
    if not said:
        return None
    kind, init = said.get("peft_type", "LORA"), said.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"it is of PEFT's {kind!r:.80}, which is not merged here; a LORA is")
    if asked := [name for name in CANNOT if said.get(name)]:
        raise ValueError(f"it asks for {', '.join(asked)}, which is not merged here")
    if not any(init is known or init == known and isinstance(init, str) for known in INITS):
        raise ValueError(f"init_lora_weights {init!r:.80} has changed the model's own weights, which is not done here")
    return AdapterConfig(
        where,
        alpha=_number("lora_alpha", said.get("lora_alpha")),
        rank=_number("r", said.get("r"), least=1),
        alphas=_pattern("alpha_pattern", said),
        ranks=_pattern("rank_pattern", said),
        rslora=bool(said.get("use_rslora")),
    )


def _number(name: str, value: Any, least: float = -math.inf) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} is {value!r:.80}, and must be a number")
    return value


def _pattern(name: str, said: dict[str, Any]) -> dict[str, float]:
    """Plain names, or ends of names; PEFT's may be any regular expression, which a file must not have run here."""
    given = said.get(name) or {}
    if not isinstance(given, dict) or len(given) > MAX_PATTERNS:
        raise ValueError(f"{name} is no table of at most {MAX_PATTERNS:,} layers")
    made = {}
    for pattern, value in given.items():
        plain = PATTERN.match(pattern) if len(pattern) < 200 else None
        if plain is None:
            raise ValueError(f"{name} has {pattern!r:.80}; names of layers are read, other regular expressions are not")
        whole = "^" if plain[1] == "^" else ""
        made.setdefault(whole + plain[3].replace("\\.", "."), _number(f"{name} of {pattern}", value))
    return made


def _own(table: dict[str, float], names: tuple[str, ...], default: float) -> float:
    """The first entry of `table` that is of a layer with these names; where there is none, the default."""
    if not table:
        return default
    ends = set()
    for name in names:
        parts = name.split(".")
        ends |= {f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))}
    return next((value for pattern, value in table.items() if pattern in ends), default)
