"""What the planner predicts for videos on machines of published figures: seconds, and memory of a card."""

from ascend_runtime.commands.plan.machines import HCCL_BUFFERS, HOST_MEMORY_PER_CARD, USABLE
from ascend_runtime.planner import choice, models, rates, videos
from ascend_runtime.planner.choosing.words import duration
from ascend_runtime.planner.facts import Machine
from ascend_runtime.specs import AccelerationSpec, SampleSpec, VideoSize
from ascend_runtime.specs.presets import chosen

CARDS = [("1 x A2 64 GB", "a2", 1, 64 * 2**30), ("8 x A2 64 GB", "a2", 8, 64 * 2**30),
         ("1 x H100 80 GB", "h100", 1, 80 * 10**9)]  # fmt: skip
FEW_STEPS = {"steps": 4, "guidance_scale": 1.0, "shift": 5.0}  # of LightX2V's LoRAs
MODELS = {  # the beginning of a transformer's file -> its published model
    "wan2.1_t2v_1.3B": "Wan2.1-T2V-1.3B", "wan2.1_t2v_14B": "Wan2.1-T2V-14B", "wan2.1_i2v": "Wan2.1-I2V-14B",
    "wan2.1_flf2v": "Wan2.1-FLF2V-14B", "wan2.2_t2v": "Wan2.2-T2V-A14B", "wan2.2_i2v": "Wan2.2-I2V-A14B",
    "wan2.2_ti2v": "Wan2.2-TI2V-5B", "hunyuan_video_t2v": "HunyuanVideo",
    "hunyuan_video_image_to_video": "HunyuanVideo-I2V-v1", "hunyuan_video_v2": "HunyuanVideo-I2V-v2",
}  # fmt: skip
LARGER = {(832, 480): (1280, 720), (960, 544): (1280, 720)}  # sizes that models of at least 13B know too
HEAD = "predicted, not measured / 预测，非实测"


def machine(card: str, number: int, memory: int) -> Machine:
    """memory: bytes of a card, of which the driver leaves a part."""
    kind = rates.CARD_FIGURES[card].kind
    buffers = HCCL_BUFFERS if kind == "npu" else 0
    return Machine(kind, card, number, int(USABLE * memory), int(number * HOST_MEMORY_PER_CARD), buffers)


def table(graph: dict) -> str:
    """A table in Markdown for a workflow in API format with Ascend Sampler: of its size, and of a larger one that its
    model knows; in all steps, and in the few of its LoRA."""
    nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
    size, sampler = nodes["AscendVideoSize"], nodes["AscendSampler"]
    own = {"steps": sampler["steps"] or None, "guidance_scale": sampler["cfg"] or None}
    switch = nodes.get("AscendFewStepLora")
    samples = [own] if switch is None else [FEW_STEPS] if switch["few_steps"] else [own, FEW_STEPS]
    sizes = [(size["width"], size["height"])]
    if "1.3B" not in nodes["AscendLoadDiffusionModel"]["model_name"] and sizes[0] in LARGER:
        sizes.append(LARGER[sizes[0]])
    rows = [[HEAD, *(label for label, *_ in CARDS)]]
    for width, height in sizes:
        for sample in samples:
            of = VideoSize.of_seconds(width, height, size["seconds"], size["fps"])
            jobs = [(*_job(nodes, of, SampleSpec(**sample), on), on) for on in (machine(*card) for _, *card in CARDS)]
            label = f"{width} x {height}, {size['seconds']:g} s, {jobs[0][1].steps} steps / 步"
            rows.append([label, *(_cell(*job) for job in jobs)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _job(nodes, size, sample, on):
    """(the model, the video) of a workflow's nodes, by their type."""
    loader, rainfusion = nodes["AscendLoadDiffusionModel"], nodes.get("AscendRainFusion")
    (name,) = {name for begin, name in MODELS.items() if loader["model_name"].startswith(begin)}
    stored = models.IN_8_BITS if "fp8" in loader["model_name"] else models.IN_16_BITS
    model = models.published(name, on.kind, loader["quantization"], stored)
    sparse = rainfusion and chosen("rainfusion", rainfusion["preset"], version=rainfusion["version"])
    video = videos.video_of(model, size, sample, AccelerationSpec(rainfusion=sparse), from_image="LoadImage" in nodes)
    return model, video


def _cell(model, video, on):
    made = choice.choice_of(model, video, on, rates.of_card(on.card))
    if not made.fitting:
        return "does not fit / 放不下"
    return f"{duration(made.chosen.running)}, {made.chosen.memory.device_peak / 1e9:.0f} GB"
