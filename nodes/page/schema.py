"""A node's schema with what ComfyUI's page makes of it: where the node is found, and which widgets it shows as what.

All of it is in the answer of /object_info: for newer pages, which know `search_aliases` and `advanced` themselves, and
for this pack's part of the page (web/widgets.js, web/search.js), which does the rest, and all of it on older pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass

from comfy_api.latest import io

from ...ascend_runtime.models.registry import families
from ..types import NAMES

LOADERS = "Ascend/loaders"
CONDITIONING = "Ascend/conditioning"
SAMPLING = "Ascend/sampling"
ACCELERATION = "Ascend/acceleration"
TOOLS = "Ascend/tools"

# Words for `search_aliases` of several nodes; a page searches the words of all languages.
FAMILIES = tuple(one.title for one in families().values())  # such as Wan
TASKS = ("text to video t2v", "image to video i2v", "文生视频", "图生视频")
DEVICES = ("npu", "multi gpu", "multi npu", "多卡")


@dataclass
class Schema(io.Schema):
    """io.Schema, and what the page shows.

    search_aliases: further words by which the node is found, of all languages; io.Schema has them since ComfyUI 0.5.
    advanced: the names of inputs that most people never touch. Their widgets are shown on request, and where they are
        linked or do not have their default.
    automatic: by the name of an input, the value that leaves the choice to the pack; the page shows "auto" for it. Or
        (value, another word that web/texts.js has). Workflows and prompts keep the value.
    only_with: by the name of an input, (another widget, its value): the widget is shown only with it.
    """

    search_aliases: list[str] = field(default_factory=list)
    advanced: tuple[str, ...] = ()
    automatic: Mapping[str, object] = field(default_factory=dict)
    only_with: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        inputs = {one.id: one for one in self.inputs or ()}
        for slot in (*inputs.values(), *(self.outputs or ())):
            slot.display_name = NAMES.get(slot.io_type, slot.display_name)
        for name in self.advanced:
            inputs[name].extra_dict["advanced"] = True
        for name, shown in self.automatic.items():
            value, word = shown if isinstance(shown, tuple) else (shown, "auto")
            inputs[name].extra_dict["shown_as"] = {"value": value, "word": word}
        for name, (widget, value) in self.only_with.items():
            inputs[name].extra_dict["only_with"] = {"widget": widget, "value": value}

    def get_v1_info(self, cls):
        info = super().get_v1_info(cls)
        if hasattr(info, "search_aliases"):
            return info
        kind = make_dataclass("NodeInfo", [("search_aliases", list, None)], bases=(type(info),))
        return kind(**asdict(info), search_aliases=list(self.search_aliases))
