"""The notes in the pack's workflows: which files to download, what a video is predicted to take, and what to set."""

from ascend_runtime.commands import templates

# Sentences in English and Chinese.
PARAGRAPH = "\n\n", "\n\n"
RUN = "Press **R** to refresh the lists, then **Run**. ", "下载上表中的文件，按 **R** 刷新后点击**运行**。"
AUTO = (
    "What is on auto is chosen for you: the ranks (one per card), how they share the work, and the settings of the "
    "model's authors. ",
    "显示“自动”或 auto 的项会自动选择：rank 数（每张卡一个）、各 rank 如何分担，以及模型的官方参数。",
)
SECONDS = (
    "Set the duration in seconds in Ascend Video Size; the number of frames follows. ",
    "在“昇腾视频尺寸”中以秒设置时长，帧数自动计算。",
)
ANY_SIZE = "Other sizes: 1280 × 720, or any multiples of 16. ", "尺寸还可用 1280 × 720，或 16 的任意倍数。"
FP16_FILES = (
    "Files with fp16 for fp8_scaled in their names work as well, and so does the diffusers folder, chosen in all three "
    "loaders with `none` for the low-noise model. ",
    "也可使用文件名中为 fp16 的版本；或在三个加载器中选择 diffusers 目录，并将“低噪声专家模型”设为 `none`。",
)
EXPERTS = (
    "The two experts have 57 GB of weights in bfloat16. Each card keeps a share of them, or the experts take turns: "
    "the planner chooses for each job, and the sampler shows it. ",
    "两个专家的权重以 bfloat16 共 57 GB。每张卡只保存一部分，或两个专家轮流上卡：由每个任务自动决定，并显示在采样器上。",
)
SWITCH = (
    "**All steps, or 4.** Turn `few_steps` on for LightX2V's LoRAs: 4 steps, and cfg 1, which uses no negative prompt. "
    "When it is off, the files may be missing, and the number of steps is what the model's authors recommend. Leave "
    "Ascend Sampler's settings on auto. ",
    "**完整步数或 4 步。** 打开“少步”即使用 LightX2V 的 LoRA：4 步、引导系数 1（不使用负面提示词）；关闭时不需要这些文件，按官方步数生成。"
    "昇腾采样器的参数请保持自动。",
)
HUNYUAN = (
    "The text encoders take 14 GB of the host's memory, or a share of that on each card. Tencent's licence excludes "
    "the EU, the UK and South Korea. ",
    "文本编码器占主机内存 14 GB，或由各卡分摊。腾讯的许可证不适用于欧盟、英国和韩国。",
)
TO_TWO_NODES = (
    "The image goes to two nodes: the text encoder reads it (`image_interleave` {}), and ",
    "图像连到两个节点：文本编码器读取它（`image_interleave` 为 {}），",
)
CORE = (
    "All nodes but the loaders and Ascend Parallel Config are core ComfyUI's, with the settings of its own template. "
    "The loaders give core's MODEL, CLIP and VAE, whose work the ranks do, so any node that takes these can be added: "
    "LoRA loaders, guiders, other samplers. To swap the loaders of your own graph, right-click the canvas and choose "
    "**Swap loaders to run on all ranks**. Ascend Sampler needs fewer nodes for the same video, and knows the model's "
    "own settings. ",
    "除加载器和并行配置外，全部是 ComfyUI 自带的节点，参数与其官方模板相同。这些加载器输出 ComfyUI 核心的 MODEL、CLIP 和 VAE，"
    "计算由各 rank 完成，因此可以接任何使用它们的节点：LoRA、引导器、其他采样器。要替换自己工作流中的加载器，请右键点击画布，"
    "选择**替换加载器，在所有 rank 上运行**。生成同样的视频，使用“昇腾采样器”所需的节点更少，并自带模型的官方参数。",
)
TWO_SAMPLERS = "Two samplers share the 20 steps, one for each expert. ", "两个采样器分担 20 步，每个专家一个。"
TI2V = (
    "The model was trained for 1280 x 704 at 24 frames per second; sizes are multiples of 32. ",
    "按 1280 × 704、每秒 24 帧训练；尺寸须为 32 的倍数。",
)
CROPPED = "An image of another shape is cropped. ", "图像比例不同时会被裁剪。"

TEXTS = {  # sentences by the workflow's short name
    "tiny_wan_text_to_video": [(
        "Press **Run**. The ranks start with the first video and stay for the next ones. Any machine will do, a CPU "
        "too.\n\n"
        "The embedded model is small: 64 x 64 pixels, 1 second, one shape that moves. It knows sentences like "
        "`a red circle moving right on a blue background`, made of these words:\n\n"
        "| shape | colour | moving | background |\n|---|---|---|---|\n"
        "| circle, square, triangle | red, green, yellow, white, cyan | left, right, up, down | black, gray, blue, "
        "purple |",
        "点击**运行**即可，无需下载：任何机器（包括 CPU）都能生成。内置模型很小：64 × 64 像素，1 秒，一个移动的形状。"
        "提示词请用表中的英文词。",
    )],
    "tiny_wan_fast_text_to_video": [(
        "Press **Run**, then read below the sampler what was saved. Ascend Step Cache leaves out steps in which little "
        "changes; Ascend RainFusion, chained to it, thins out the attention of large videos (in one as small as this "
        "there is nothing to leave out). `preset` goes from quality to fast. Ascend AttentionCache or Ascend Block "
        "Cache can take the step cache's place; two caches cannot be combined. The nodes work with every model of the "
        "other templates: connect them to Ascend Sampler.",
        "点击**运行**，然后在采样器下方查看节省了多少。步缓存省去变化不大的步；串接的 RainFusion 让大视频的注意力变稀疏"
        "（这样小的视频没有可省的）。预设从 quality 到 fast 依次变快。也可换成 AttentionCache 或块缓存，但两种缓存不能同时使用。"
        "这些节点适用于其他模板中的任何模型：接到昇腾采样器即可。",
    )],
    "hunyuan_video_text_to_video": [RUN, AUTO, SECONDS, (
        "cfg is 1, so there is no negative prompt. 5.3 seconds are 129 frames, the most that the model was "
        "trained for. ",
        "引导系数为 1，因此没有负面提示词。5.3 秒为 129 帧，是训练时的最大帧数。",
    ), HUNYUAN],
    "hunyuan_video_v1_image_to_video": [RUN, AUTO, SECONDS, [text.format(2) for text in TO_TWO_NODES], (
        "the model gets it as the first frame. As in the original, the first four frames are dropped after decoding: "
        "ImageFromBatch keeps 125 of 129. Delete that node to keep all. ",
        "模型把它当作首帧。与官方代码一致，解码后丢弃前四帧：ImageFromBatch 保留 129 帧中的 125 帧；删除该节点即可保留全部帧。",
    ), HUNYUAN],
    "hunyuan_video_v2_image_to_video": [RUN, AUTO, SECONDS, [text.format(4) for text in TO_TWO_NODES], (
        "it stays in the latent as the first frame, so the video begins with it. For larger movements set `shift` "
        "to 17 in Ascend Sampler; auto is 7. ",
        "同时它作为首帧保留在 Latent 中，因此视频从这张图像开始。希望动作更大时，可将采样器的“时间步偏移”设为 17（自动为 7）。",
    ), HUNYUAN],
    "stock_hunyuan_video_text_to_video": [RUN, CORE, HUNYUAN],
    "stock_wan2.2_i2v_a14b_image_to_video": [RUN, CORE, TWO_SAMPLERS, EXPERTS],
    "stock_wan2.2_t2v_a14b_text_to_video": [RUN, CORE, TWO_SAMPLERS, EXPERTS],
    "stock_wan2.2_ti2v_5b_text_to_video": [RUN, CORE, (
        "To begin the video with an image, connect Load Image to start_image of Wan22ImageToVideoLatent. ",
        "将“加载图像”连到 Wan22ImageToVideoLatent 的 start_image，即可图生视频。",
    )],
    "wan2.1_flf2v_14b_first_last_frame_to_video": [RUN, AUTO, SECONDS, (
        "Choose the first and the last frame. The model was trained for 1280 x 720: smaller videos come out worse. ",
        "请选择首帧与尾帧。模型按 1280 × 720 训练，更小的尺寸效果较差。",
    )],
    "wan2.1_i2v_14b_image_to_video": [RUN, AUTO, SECONDS, (
        "For 1280 x 720 take `wan2.1_i2v_720p_14B_fp16.safetensors`, from the same place, and set that size. ",
        "要生成 1280 × 720，请换用同一仓库的 `wan2.1_i2v_720p_14B_fp16.safetensors` 并修改尺寸。",
    ), CROPPED],
    "wan2.1_t2v_1.3b_text_to_video": [RUN, AUTO, SECONDS, (
        "cfg 6 and shift 8 are what its authors recommend for this small model, which was trained for 832 x 480. ",
        "引导系数 6 与时间步偏移 8 为官方对该小模型的建议值。训练尺寸为 832 × 480。",
    )],
    "wan2.1_t2v_14b_text_to_video": [RUN, AUTO, SECONDS, ANY_SIZE],
    "wan2.2_i2v_a14b_image_to_video": [RUN, AUTO, SECONDS, CROPPED, FP16_FILES, PARAGRAPH, SWITCH, PARAGRAPH, EXPERTS],
    "wan2.2_t2v_a14b_text_to_video": [RUN, AUTO, SECONDS, FP16_FILES, PARAGRAPH, SWITCH, PARAGRAPH, EXPERTS],
    "wan2.2_t2v_a14b_text_to_video_fast": [RUN, SECONDS, (
        "This graph is made for speed: 4 steps with LightX2V's LoRAs, linear layers in 8 bits (`quantization` of the "
        "loader), RainFusion, which leaves out most of the attention, and every card. Each of the three changes "
        "the video a little. To see how much, switch them off one by one: `few_steps`, `quantization`, and the link "
        "from Ascend RainFusion. ",
        "此工作流追求速度：LightX2V 的 4 步 LoRA、8 位线性层（加载器的“量化”）、省去大部分注意力计算的 RainFusion，并使用所有的卡。"
        "三者都会略微改变视频；可逐个关闭以比较：“少步”、“量化”，以及 RainFusion 的连线。",
    ), PARAGRAPH, EXPERTS],
    "wan2.2_ti2v_5b_image_to_video": [RUN, AUTO, SECONDS, TI2V, CROPPED],
    "wan2.2_ti2v_5b_text_to_video": [RUN, AUTO, SECONDS, TI2V, (
        "Connect a Load Image to start_image, and the video begins with it. ",
        "将“加载图像”连到首帧图像即为图生视频。",
    )],
}  # fmt: skip
SOURCE = (
    "*Seconds without loading, and memory of a card, as `python -m ascend_runtime plan` predicts them from published "
    "figures. 表中为不含加载的耗时与每张卡的显存，由 `plan` 命令按公开数据预测。*"
)


def table_of(text):
    """The table of predictions in a note; empty if it has none."""
    parts = text.split("\n\n")
    return parts[parts.index(SOURCE) - 1] if SOURCE in parts else ""


def note(short, files, table):
    """The text of a workflow's note, in Markdown.

    short: its short name. files: what it loads, as (name, folder, address, other address). table: what its video is
    predicted to take; empty if that is not predicted.
    """
    parts = [f"## {templates.SHOWN[short]}"]
    if files:
        rows = [f"| {name} | [Hugging Face]({one}), [ModelScope]({other}) | {folder} |"
                for name, folder, one, other in files]
        parts.append("\n".join(["| download / 下载 | | `ComfyUI/models` |", "|---|---|---|", *rows]))
    if table:
        parts += [table, SOURCE]
    for language in (0, 1):
        parts.append("".join(sentence[language] for sentence in TEXTS[short]).strip())
    return "\n\n".join(parts) + "\n"
