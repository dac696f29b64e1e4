"""The chat templates around a prompt, and which tokens of the Llama's answer are the prompt's.

The texts and numbers are those of diffusers' HunyuanVideoPipeline and HunyuanVideoImageToVideoPipeline (Apache-2.0),
DEFAULT_PROMPT_TEMPLATE.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROMPT_TOKENS = 256  # of a prompt after the template, in HunyuanVideo's training
_START, _END, _OVER = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:"
)


@dataclass(frozen=True)
class Template:
    """before, after: the text around a prompt. crop: the number of tokens before it, with the start token. tail: the
    number of tokens after it. dropped: how many of these, the first ones, are not part of the result.
    """

    before: str
    after: str
    crop: int
    tail: int
    dropped: int = 0

    def around(self, text: str) -> str:
        return f"{self.before}{text}{self.after}"

    @property
    def longest(self) -> int:
        """The number of tokens at which a prompt in this template is truncated."""
        return self.crop + MAX_PROMPT_TOKENS

    def kept(self, length: int, truncated: bool) -> list[slice]:
        """The parts of `length` tokens that are the result. The original drops the same number of tokens of a truncated
        prompt, whose own last tokens these are."""
        tail = self.dropped if truncated else self.tail
        parts = [slice(self.crop, length - tail), slice(length - tail + self.dropped, length)]
        return [part for part in parts if part.stop > part.start] if self.dropped else [slice(self.crop, length)]


TEXT_TO_VIDEO = Template(
    f"{_START}system{_END}\n\nDescribe the video by detailing the following aspects: {_ASPECTS}{_OVER}"
    f"{_START}user{_END}\n\n",
    _OVER,
    crop=95,
    tail=1,
)
# Here the end of the prompt's turn and the header of the answer's are dropped, but not the two new lines after it.
IMAGE_TO_VIDEO = Template(
    f"{_START}system{_END}\n\n<image>\nDescribe the video by detailing the following aspects according to the "
    f"reference image: {_ASPECTS}{_OVER}\n\n{_START}user{_END}\n\n",
    f"{_OVER}{_START}assistant{_END}\n\n",
    crop=103,
    tail=5,
    dropped=4,
)
IMAGE_AT = 5  # the place of the image's token
