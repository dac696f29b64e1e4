"""The nodes: they turn widgets into descriptions of the work, which the ranks do."""

from comfy_api.latest import ComfyExtension

from . import accelerators, metadata, stock, templates
from .conditioning import TextEncode
from .image_to_video import ImageToVideo
from .loaders import LoadDiffusionModel, LoadLora, LoadTextEncoder, LoadVAE
from .profiler import Profiler
from .ranks import FreeMemory, ParallelConfig
from .sampler import Sampler, SamplerAdvanced
from .stock import adoption
from .vae import VAEDecode, VAEEncode


class AscendVideo(ComfyExtension):
    def __init__(self):
        adoption.serve()
        metadata.serve()
        templates.serve()

    async def get_node_list(self):
        return [
            ParallelConfig,
            LoadDiffusionModel,
            LoadLora,
            LoadTextEncoder,
            LoadVAE,
            TextEncode,
            ImageToVideo,
            Sampler,
            SamplerAdvanced,
            VAEDecode,
            VAEEncode,
            *accelerators.NODES,
            *templates.NODES,
            Profiler,
            FreeMemory,
            *stock.NODES,
        ]
