"""A transformers 4 that a ComfyUI's Python has: the requirements keep it, what it reads is read, core's prompts stay.

`bash scripts/test.sh --transformers 4.57` runs this, and all else that depends on transformers, with that release.
"""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from ascend_runtime import TextEncoderSpec
from ascend_runtime.components import Components
from scripts.lib.comfy_server import COMFYUI
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets" / "tiny_wan"
PROMPT = "a red circle moving right"
# Prints what core's HunyuanVideo makes of its whole template, and what the tokenizer's own file says.
CORE = """
import json, sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
from comfy.text_encoders.hunyuan_video import HunyuanVideoTokenizer
from tokenizers import Tokenizer
core = HunyuanVideoTokenizer()
text = core.llama_template.format("a red circle moving right")
file = "comfy/text_encoders/llama_tokenizer/tokenizer.json"
print(json.dumps([core.llama.tokenizer(text)["input_ids"], Tokenizer.from_file(file).encode(text).ids]))
"""


def requirements():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


def test_the_requirements_keep_a_transformers_4():
    """Its releases take no huggingface_hub from 1 on, and diffusers 0.39 is the last one that takes an older. pip
    prefers what is there in what it settles first: packages with an upper bound, in the order of the file."""
    named = requirements()
    order = [name for name, requirement in named.items() if "<" in str(requirement.specifier)]
    assert order == ["transformers", "diffusers"]
    for version in ("4.50.3", "4.57.0", "4.57.6", "5.24.0"):
        assert Version(version) in named["transformers"].specifier
    assert Version("0.39.0") in named["diffusers"].specifier and Version("0.38.0") not in named["diffusers"].specifier


def test_what_is_installed_is_what_the_requirements_allow():
    for name in ("transformers", "diffusers"):
        assert Version(metadata.version(name)) in requirements()[name].specifier


@pytest.mark.parametrize("special", [[], ["<extra>"], {}], ids=["a list", "a list of one", "a mapping"])
def test_a_tokenizer_is_read_whichever_release_wrote_it(tmp_path, special):
    """Release 5 writes a list of special tokens, which release 4 fails on, and names a class that release 4 lacks."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    config = folder / "tokenizer" / "tokenizer_config.json"
    new = {"extra_special_tokens": special, "backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **new}))
    encoder = Components(torch.device("cpu")).get(TextEncoderSpec(path=str(folder)), lambda *_: None)
    tokens = encoder.encoders["text_encoder"].tokenizer(PROMPT, truncation=True, max_length=512)
    assert tokens.input_ids.tolist() == [[4, 17, 8, 14, 18, 1]]


@pytest.mark.skipif(Version(metadata.version("transformers")).major > 4, reason="transformers 5 breaks core's prompts")
def test_cores_hunyuan_video_prompts_are_whole():
    done = subprocess.run([sys.executable, "-c", CORE], cwd=COMFYUI, capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids, expected = json.loads(done.stdout.splitlines()[-1])
    assert ids == expected and len(ids) > 100
