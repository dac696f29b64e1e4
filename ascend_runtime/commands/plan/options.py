"""The arguments of the command. Does not import torch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ...checkpoints.paths import existing
from ...models.registry import families
from ...planner.choosing.arrangements import Fixed
from ...planner.models import is_published
from ...planner.rates import CARD_FIGURES
from ...specs import VideoSize
from ...specs.models import QUANTIZATIONS
from ...specs.parallel import MAX_RANKS
from .. import video_options
from ..comparison import settings

STORED = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}
MOST_MEMORY = 2**20  # GB
MOST_LINK = 1e6  # Gbit/s


def declare(parser: ArgumentParser) -> None:
    published = ", ".join(name for family in families().values() for name in family.published)
    parser.description = (
        "Predicts seconds and memory of each plan of a job, shows which fit, and which one a job would choose.\n\n"
        f"Works without cards. MODEL can be the name of a published model, whose files are not needed: {published}."
    )
    add = parser.add_argument
    video_options.add_model(add)
    add("--vae", metavar="PATH", help="the VAE's folder or file (default: in the model's folder)")
    video_options.add_video(add)
    add("--image", action="store_true", help="the video begins with an image")
    add("--ranks", type=int, default=0, metavar="N",
        help="number of cards, of all machines (default: those found, or 8, times M)")  # fmt: skip
    add("--machines", type=int, default=1, metavar="M",
        help="number of machines, with N/M cards each (default: %(default)s)")  # fmt: skip
    add("--link", type=float, metavar="GBIT/S",
        help="what each machine sends to the others, over all its links; needed with several machines")  # fmt: skip
    add("--card", choices=tuple(CARD_FIGURES), help="the kind of cards (default: those found)")
    add("--device-memory", type=float, metavar="GB",
        help="free memory of each card (default: what is found, or 95 %% of the card's)")  # fmt: skip
    add("--host-memory", type=float, metavar="GB",
        help="free memory of a host (default: of this host, or 128 GB for each card of another one)")  # fmt: skip
    add("--quantization", choices=QUANTIZATIONS, default=QUANTIZATIONS[0], help="(default: %(default)s)")
    add("--stored", choices=tuple(STORED), default="bf16",
        help="of a published model: the dtype of its files (default: %(default)s)")  # fmt: skip
    add("--parallel", metavar="NAME=VALUE,...", help="what is fixed of the plan, such as ulysses_degree=4,fsdp=true")
    add("--measure", action="store_true",
        help="run two minutes of small jobs first, and keep what they show of this host next to the model")  # fmt: skip
    add("--json", action="store_true", help="print the result as JSON")


def check_plan(arguments: Namespace) -> None:
    """Raises ValueError for options that are invalid for every model."""
    if not is_published(arguments.model):
        existing_model(arguments.model)
        if arguments.stored != "bf16":
            raise ValueError("--stored is only for published models; a file shows its own dtype.")
    if arguments.measure and (is_published(arguments.model) or arguments.card not in (None, "cpu")):
        raise ValueError("--measure runs jobs of this host's devices. Give a model's folder or file, and no --card.")
    for name in ("low_noise", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        if getattr(arguments, name) is not None:
            existing(getattr(arguments, name))
    video_options.sampling_of(arguments, seed=0)
    video_options.size_of(arguments, VideoSize())
    fixed_of(arguments)
    _check_machines(arguments)
    for name in ("device_memory", "host_memory"):
        number = getattr(arguments, name)
        if number is not None and not 0 < number <= MOST_MEMORY:
            raise ValueError(f"--{name.replace('_', '-')} is {number:g}; give GB, such as 64.")


def _check_machines(arguments: Namespace) -> None:
    count, ranks, link = arguments.machines, arguments.ranks, arguments.link
    if not 1 <= count <= MAX_RANKS or ranks % count:
        raise ValueError(f"--machines is {count}; give a number that divides the cards, such as 2 for --ranks 16.")
    if count > 1 and link is None:
        raise ValueError("--machines needs --link: the Gbit/s that each machine sends to the others, such as 25.")
    if link is not None and not 0 < link <= MOST_LINK:
        raise ValueError(f"--link is {link:g}; give Gbit/s, such as 25, or 1600 for 8 links of 200.")
    if count > 1 and arguments.measure:
        raise ValueError("--measure runs jobs of this host only. Give it without --machines.")


def existing_model(path: str) -> None:
    """Raises ValueError for a model that is neither on disk nor published."""
    try:
        existing(path)
    except ValueError as error:
        known = ", ".join(name for family in families().values() for name in family.published)
        raise ValueError(f"{error} It is no published model either; those are {known}.") from None


def fixed_of(arguments: Namespace) -> Fixed:
    """What the user has decided."""
    return Fixed(settings.parallel_of(arguments.parallel, arguments.ranks))


def begins(arguments: Namespace) -> str:
    return f"planning videos of {arguments.model}"
