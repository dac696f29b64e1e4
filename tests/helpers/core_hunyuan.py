"""What core ComfyUI makes of HunyuanVideo files, for a test: `core_hunyuan.py COMFYUI FOLDER`.

FOLDER holds cases.json, {case: {"file": a transformer's, "lora": null or a LoRA's, "strength": its}}, and
inputs.safetensors: latent, timestep, text, pooled, guidance (as core takes it, 6.0). Writes made.safetensors: the
velocity of each case.
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

    inputs, made = load_file(folder / "inputs.safetensors"), {}
    for case, given in json.loads((folder / "cases.json").read_text()).items():
        model = comfy.sd.load_diffusion_model(str(folder / given["file"]), {"dtype": torch.float32})
        if given["lora"]:
            known = comfy.lora.model_lora_keys_unet(model.model, {})
            lora = load_file(folder / given["lora"])
            patches = comfy.lora.load_lora(lora, known)
            assert len(patches) == sum(name.endswith((".lora_up.weight", ".lora_B.weight")) for name in lora), case
            assert set(model.add_patches(patches, given["strength"])) == set(patches), case
        model.patch_model()
        with torch.no_grad():
            made[case] = model.model.diffusion_model(
                inputs["latent"], inputs["timestep"], inputs["text"], inputs["pooled"],
                guidance=inputs["guidance"], attention_mask=None,
            )  # fmt: skip
    save_file(made, folder / "made.safetensors")


if __name__ == "__main__":
    main()
