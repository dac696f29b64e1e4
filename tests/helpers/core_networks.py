"""What core ComfyUI's networks make of files and inputs, for a test: `core_networks.py COMFYUI FOLDER`.

FOLDER holds cases.json, {case: file of a transformer}, for each case CASE-inputs.safetensors ("latent" with its further
channels, "timesteps", "context", and others as core's network names them), and shapes.json, {file: {name: shape}}: of
tensors without data. Writes made.safetensors: the velocity of each case; and found.json, {file: what core makes of the
shapes: the names of its model's class, and its unet_config; and of the file: its unet_config, and the names of all
tensors of its network}.
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
    import comfy.model_detection
    import comfy.sd

    made, found, models = {}, {}, {}
    for file, shapes in json.loads((folder / "shapes.json").read_text()).items():
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        config = comfy.model_detection.model_config_from_unet(tensors, "")
        model = comfy.sd.load_diffusion_model(str(folder / file), {"dtype": torch.float32}).model
        found[file] = {
            "class": type(config).__name__,
            "config": config.unet_config,
            "config of the file": model.model_config.unet_config,
            "class of the file": type(model.model_config).__name__,
            "shapes": {name: list(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()},
        }
        models[file] = model.diffusion_model
    for case, file in json.loads((folder / "cases.json").read_text()).items():
        inputs = load_file(folder / f"{case}-inputs.safetensors")
        with torch.no_grad():
            made[case] = models[file](inputs.pop("latent"), inputs.pop("timesteps"), **inputs).contiguous()
    (folder / "found.json").write_text(json.dumps(found, default=str))
    save_file(made, folder / "made.safetensors")


if __name__ == "__main__":
    main()
