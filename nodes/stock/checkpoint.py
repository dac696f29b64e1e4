"""The loader of a file with all networks of a model: what Load Checkpoint is for one whose work this process does."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ...ascend_runtime.errors import coded_error
from ...ascend_runtime.models.registry import family
from ...ascend_runtime.specs import DiffusionModelSpec, VaeSpec
from .. import comfy_bridge, types
from ..model_files import CHECKPOINTS
from ..page.schema import DEVICES, FAMILIES, LOADERS, Schema
from ..page.validation import refusal
from ..types import Handle, ModelHandle, RanksHandle
from .clip import CLIP_OUTPUT, clip_of
from .core_options import dtype_for, options_of
from .model import model_of
from .vae import RanksVae


class CheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendCheckpointLoaderSimple",
            display_name="Ascend Load Checkpoint (Core)",
            category=LOADERS,
            search_aliases=[*FAMILIES, *DEVICES, "checkpoint loader", "all in one", "aio", "整合模型"],
            description="Loads a file with the diffusion model, the text encoder and the VAE as core's Load Checkpoint "
            "does. The ranks do their work.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=options_of("CheckpointLoaderSimple", "ckpt_name"),
                    tooltip="A file in models/checkpoints that holds all networks of a Wan or HunyuanVideo model. "
                    "Other models need core's Load Checkpoint.",
                ),
                types.parallel_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For any node that takes core's MODEL."),
                CLIP_OUTPUT(),
                io.Vae.Output(display_name="VAE", tooltip="For any node that takes core's VAE."),
            ],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name) -> bool | str:
        return refusal(_path_of, ckpt_name)

    @classmethod
    def execute(cls, ckpt_name, parallel=None) -> io.NodeOutput:
        path, ranks = _path_of(ckpt_name), parallel or RanksHandle()
        model = model_of(ModelHandle(DiffusionModelSpec(path=path), ranks))
        vae = Handle(VaeSpec(path=path, dtype=dtype_for("vae")), ranks)
        form = comfy_bridge.vae_form(vae)
        return io.NodeOutput(model, clip_of([path], family(form.family), "auto", ranks), RanksVae(vae, form))


def _path_of(name: str) -> str:
    path = folder_paths.get_full_path(CHECKPOINTS, name) if isinstance(name, str) and "\0" not in name else None
    if path is None:
        found = ", ".join(folder_paths.get_filename_list(CHECKPOINTS)) or "none"
        places = ", ".join(folder_paths.get_folder_paths(CHECKPOINTS))
        raise coded_error(
            "AV-1301",
            f"There is no checkpoint {name!r}. Checkpoints that were found: {found}. To add one, put it into "
            f"models/{CHECKPOINTS}. Folders that were searched: {places}.",
        )
    return path
