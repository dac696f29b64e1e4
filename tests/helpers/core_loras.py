"""What core ComfyUI makes of LoRA files, for a test: `core_loras.py COMFYUI FOLDER`.

FOLDER holds cases.json: {"models": {case: {"file": a transformer's, "loras": [[a LoRA's, its strength], ...]}},
"layers": {case: {"file": of one layer named "layer", "shape": its weight's, "strength": of the change}}}. Writes for
each model CASE.safetensors, its weights with the LoRA, and layers.safetensors, the change of each layer.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main():
    folder = Path(sys.argv[2])
    sys.path.append(sys.argv[1])
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    import comfy.lora
    import comfy.sd

    cases = json.loads((folder / "cases.json").read_text())
    for case, given in cases["models"].items():
        model = comfy.sd.load_diffusion_model(str(folder / given["file"]), {"dtype": torch.float32})
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        for lora, strength in given["loras"]:
            patches = comfy.lora.load_lora(load_file(folder / lora), known)
            assert set(model.add_patches(patches, strength)) == set(patches), case
        model.patch_model()
        state = model.model.diffusion_model.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / f"{case}.safetensors")
    made = {}
    for case, given in cases["layers"].items():
        (patch,) = comfy.lora.load_lora(load_file(folder / given["file"]), {"layer": "layer.weight"}).values()
        patches = [(given["strength"], patch, 1.0, None, None)]
        made[case] = comfy.lora.calculate_weight(patches, torch.zeros(given["shape"]), "layer.weight")
    save_file(made, folder / "layers.safetensors")


if __name__ == "__main__":
    main()
