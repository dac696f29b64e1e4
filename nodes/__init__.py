"""The nodes: they turn widgets into descriptions of the work, which the ranks do."""

from comfy_api.latest import ComfyExtension

from . import accelerators, metadata, stock
from .conditioning import TextEncode, VideoSize
from .image_to_video import ImageToVideo
from .loaders import LoadDiffusionModel, LoadTextEncoder, LoadVAE
from .loras import FewStepLora, LoadLora
from .page import workflows
from .profiler import Profiler
from .ranks import FreeMemory, ParallelConfig
from .sampler import Sampler, SamplerAdvanced
from .stock import adoption
from .vae import VAEDecode, VAEEncode


class AscendVideo(ComfyExtension):
    def __init__(self):
        adoption.serve()
        metadata.serve()
        workflows.serve()

    async def get_node_list(self):
        return [
            ParallelConfig,
            LoadDiffusionModel,
            LoadLora,
            FewStepLora,
            LoadTextEncoder,
            LoadVAE,
            TextEncode,
            VideoSize,
            ImageToVideo,
            Sampler,
            SamplerAdvanced,
            VAEDecode,
            VAEEncode,
            *accelerators.NODES,
            Profiler,
            FreeMemory,
            *stock.NODES,
        ]
