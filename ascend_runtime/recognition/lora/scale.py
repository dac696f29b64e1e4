"""Reads a LoRA's alpha and rank from metadata: diffusers' header, or PEFT's adapter_config.json.

A layer's change is scaled by alpha / rank, or alpha / sqrt(rank) if use_rslora is set (Kalajdzievski, arXiv
2312.03732), as in PEFT (peft/tuners/lora/layer.py). alpha_pattern and rank_pattern override them for layers, by their
names or ends of names; the first match counts. Other settings of PEFT's configuration that change the result are
rejected. ss_network_alpha in kohya's header is not read: kohya's software uses the rank if a file has no alpha.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.bounded import parse_json, read_bounded
from ...checkpoints.faults import as_value_error
from ...checkpoints.formats.tensor_file import TensorFile
from ...errors import coded_error

IN_THE_HEADER = "lora_adapter_metadata"  # diffusers/loaders/lora_base.py
PEFTS_CONFIG, PEFTS_WEIGHTS = "adapter_config.json", "adapter_model"  # the second without its suffix
IN_FOLDERS = (f"{PEFTS_WEIGHTS}.safetensors", f"{PEFTS_WEIGHTS}.bin", f"{PEFTS_WEIGHTS}.pt",
              "pytorch_lora_weights.safetensors")  # fmt: skip
MAX_BYTES = 4 * 2**20  # of a configuration
MAX_PATTERNS = 10_000
LAYER_PATTERN = re.compile(r"^(\^|\.\*(\\?\.)?)?([\w\-]+(\\?\.[\w\-]+)*)\$?$")
# PEFT's initialisations whose product is 0 at first; the others change the base model's weights too.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
UNSUPPORTED = ("use_qalora", "fan_in_fan_out", "layer_replication", "use_bdlora")


@dataclass(frozen=True)
class AdapterConfig:
    """where: its file, as errors name it. alphas, ranks: overrides for layers, by name or the end of a name; a name
    that begins with ^ must match from its start. dora: whether each layer has a magnitude too."""

    where: str
    alpha: float
    rank: int
    alphas: dict[str, float]
    ranks: dict[str, float]
    rslora: bool
    dora: bool = False

    def scale(self, names: tuple[str, ...], rank: int) -> float:
        """The factor for the product of two matrices of this rank. names: the names of their layer.

        Raises ValueError if the matrices have another rank than the configuration says.
        """
        stated = _own(self.ranks, names, self.rank)
        if stated != rank:
            raise coded_error(
                "AV-1405",
                f"{self.where} says that {names[0]} has the rank {stated:g}, but its matrices have the rank {rank}, so "
                "its scale is unknown. Use the file as its trainer wrote it.",
            )
        return _own(self.alphas, names, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def weights_file(path: Path) -> Path:
    """The weights of a LoRA given as PEFT's folder, or `path` itself. Raises ValueError if there is no file."""
    if path.is_dir():
        found = next((file for file in map(path.joinpath, IN_FOLDERS) if file.is_file()), None)
        if found is None:
            raise coded_error(
                "AV-1301", f"The folder {path} holds no LoRA. Give its file, or PEFT's folder, which holds one of "
                f"{', '.join(IN_FOLDERS)}, with {PEFTS_CONFIG}.",
            )  # fmt: skip
        return found
    if not path.is_file():
        raise coded_error(
            "AV-1301",
            f"There is no LoRA {path}. Give the path of a .safetensors file; ComfyUI's LoRAs belong in models/loras.",
        )
    return path


def config_file(path: Path) -> Path | None:
    """PEFT's configuration of a LoRA file; None if there is none, or the file does not have PEFT's name."""
    found = path.with_name(PEFTS_CONFIG)
    return found if path.stem == PEFTS_WEIGHTS and found.is_file() else None


def adapter_config(file: TensorFile, section: str) -> AdapterConfig | None:
    """A file's configuration for a part of a diffusers pipeline ("transformer"); None if there is none.

    Raises ValueError for a configuration that is invalid, or that does not describe a plain LoRA.
    """
    header, config = file.header.get(IN_THE_HEADER), config_file(file.path)
    if header is not None:
        where = f"{file.path}: the header's {IN_THE_HEADER}"
        with as_value_error(file.path, f"the header's {IN_THE_HEADER}", "AV-1405"):
            return _config(where, _section(_object(header), section))
    if config is None:
        return None
    with as_value_error(config, "the PEFT configuration", "AV-1405"):
        return _config(str(config), _object(read_bounded(config, MAX_BYTES)))


def _object(text: str | bytes) -> dict[str, Any]:
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _section(content: dict[str, Any], section: str) -> dict[str, Any]:
    """diffusers prefixes each name with the part of the pipeline, unless the model itself saved the file."""
    if "r" in content or "lora_alpha" in content:
        return content
    own = {key.removeprefix(f"{section}."): value for key, value in content.items() if key.startswith(f"{section}.")}
    if content and not own:
        raise ValueError(f"it says nothing about the {section}")
    return own


def _config(where: str, given: dict[str, Any]) -> AdapterConfig | None:
    if not given:
        return None
    kind, init = given.get("peft_type", "LORA"), given.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"it has PEFT's type {kind!r:.80}; only LORA is supported")
    if unsupported := [name for name in UNSUPPORTED if given.get(name)]:
        raise ValueError(f"it sets {', '.join(unsupported)}, which is not supported")
    if not any(init is known or init == known and isinstance(init, str) for known in INITS):
        raise ValueError(f"init_lora_weights {init!r:.80} changes the base model's weights, which is not supported")
    return AdapterConfig(
        where,
        alpha=_number("lora_alpha", given.get("lora_alpha")),
        rank=_number("r", given.get("r"), least=1),
        alphas=_pattern("alpha_pattern", given),
        ranks=_pattern("rank_pattern", given),
        rslora=bool(given.get("use_rslora")),
        dora=bool(given.get("use_dora")),
    )


def _number(name: str, value: Any, least: float = -math.inf) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} is {value!r:.80}, and must be a number")
    return value


def _pattern(name: str, given: dict[str, Any]) -> dict[str, float]:
    """Overrides by layer names or ends of names. PEFT allows any regular expression; running those of a file is
    unsafe."""
    table = given.get(name) or {}
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise ValueError(f"{name} must be a table of at most {MAX_PATTERNS:,} layers")
    made = {}
    for pattern, value in table.items():
        plain = LAYER_PATTERN.match(pattern) if len(pattern) < 200 else None
        if plain is None:
            raise ValueError(f"{name} has {pattern!r:.80}; only layer names are supported, not regular expressions")
        whole = "^" if plain[1] == "^" else ""
        made.setdefault(whole + plain[3].replace("\\.", "."), _number(f"{name} of {pattern}", value))
    return made


def _own(table: dict[str, float], names: tuple[str, ...], default: float) -> float:
    """The first entry of `table` that matches a layer with these names, else the default."""
    if not table:
        return default
    ends = set()
    for name in names:
        parts = name.split(".")
        ends |= {f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))}
    return next((value for pattern, value in table.items() if pattern in ends), default)
