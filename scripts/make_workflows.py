"""Makes the UI-format workflows of workflows/ from the API-format ones of workflows/api/, in the real ComfyUI page.

    .venv/bin/python scripts/make_workflows.py

The API format defines what a workflow does. This script adds the notes and the download links; lib/workflow_layout.py
places the nodes.
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
WORKFLOWS = REPOSITORY / "workflows"
sys.path.insert(0, str(REPOSITORY))
from scripts.lib.comfy_browser import ComfyBrowser  # noqa: E402
from scripts.lib.comfy_server import ComfyServer  # noqa: E402
from scripts.lib.workflow_layout import NOTE, arrange  # noqa: E402

HUGGING_FACE = "https://huggingface.co/Comfy-Org/{}/resolve/main/split_files/{}/{}"
MODELSCOPE = "https://modelscope.cn/models/Comfy-Org/{}/resolve/master/split_files/{}/{}"
FOLDERS = {  # of ComfyUI's models, by the type of the node that loads from it
    "AscendLoadDiffusionModel": "diffusion_models", "AscendLoadTextEncoder": "text_encoders", "AscendLoadVAE": "vae",
    "AscendLoadLora": "loras", "CLIPVisionLoader": "clip_vision", "AscendUNETLoader": "diffusion_models",
    "AscendCLIPLoader": "text_encoders", "AscendDualCLIPLoader": "text_encoders", "AscendVAELoader": "vae",
}  # fmt: skip
VISION = "llava_llama3_vision.safetensors"  # in clip_vision, though Ascend Load Text Encoder loads it
REPOSITORIES = {  # of Comfy-Org, by how the names of their files begin; all other files are in OLDEST
    "wan2.2": "Wan_2.2_ComfyUI_Repackaged",
    "hunyuan_video": "HunyuanVideo_repackaged",
    "llava_llama3": "HunyuanVideo_repackaged",
    "clip_l.": "HunyuanVideo_repackaged",
}
OLDEST = "Wan_2.1_ComfyUI_repackaged"

# For notes of models with two experts: why fsdp is on, and where the text encoder runs.
MEMORY = {
    "{memory}": """\
`fsdp` gives each card a share of both experts' weights: of 57 GB, 7 on each of eight cards. Without it, both must fit \
on one card, or wait in the host's memory, once for each card. The text encoder runs where a prompt is predicted to be \
encoded sooner: on the host's CPU, or on the cards, where it takes 1.4 GB on each of eight. The log shows how long it \
takes, as `encode`; `placement` of Ascend Load Text Encoder sets the place.""",
    "{内存}": """\
“FSDP 权重分片”让每张卡只保存两个专家权重的一部分：共 57 GB，8 卡时每卡约 7 GB；不开启时，两个专家要么都放在一张卡上，要么在主机内存中\
为每张卡各存一份。文本编码器会在预计更快的位置运行：主机 CPU，或各卡（8 卡时每卡占用 1.4 GB）。耗时见日志中的 `encode`；\
也可用“昇腾加载文本编码器”的“位置”指定。""",
}

# For notes of HunyuanVideo: its files and its memory.
SIZES = {
    "{sizes}": """\
Sizes: 1280 x 720, 960 x 544, 720 x 720, or other multiples of 16; length 4n+1, up to 129. By its shapes, the model \
takes 26 GB in bfloat16, and 1280 x 720 x 129 another 9 GB, which several cards share: a card of 64 GB has room. \
With less, several cards share the weights; on one card, use `quantization` in the loader. The text encoders take \
14 GB of the host's memory, or a share of that on each card. Tencent's licence excludes the EU, the UK and South \
Korea.""",
    "{尺寸}": """\
尺寸：1280 x 720、960 x 544 或其他 16 的倍数；帧数为 4n+1，最多 129。按张量形状计算，模型占 26 GB，\
1280 x 720 x 129 另需 9 GB（由多张卡分摊），一张 64 GB 的卡可放下；不足时多张卡会自动分摊权重，单卡请用加载器的“量化”。\
文本编码器占主机内存 14 GB，或由各卡分摊。腾讯的许可证不适用于欧盟、英国和韩国。""",
}

# For notes of graphs of core's own nodes.
STOCK = {
    "{stock}": """\
Press **R** to refresh the lists, then **Run**. All nodes but the loaders and Ascend Parallel Config are core \
ComfyUI's, with the settings of its own template. The loaders give core's MODEL, CLIP and VAE, whose work the ranks \
do, so any node that takes these can be added: LoRA loaders, guiders, other samplers. To swap the loaders of your own \
graph, right-click the canvas and choose **Swap loaders to run on all ranks**. Ascend Sampler needs fewer nodes for \
the same video, and knows the model's own settings.""",
    "{原生}": """\
下载上表中的文件，按 **R** 刷新后点击**运行**。除加载器和并行配置外，全部是 ComfyUI 自带的节点，参数与其官方模板相同。\
这些加载器输出 ComfyUI 核心的 MODEL、CLIP 和 VAE，计算由各 rank 完成，因此可以接任何使用它们的节点：LoRA、引导器、其他采样器。\
要替换自己工作流中的加载器，请右键点击画布，选择**替换加载器，在所有 rank 上运行**。生成同样的视频，使用“昇腾采样器”所需的节点更少，\
并自带模型的官方设置。""",
    "{two models}": """\
Two samplers share the 20 steps, one for each expert. `fsdp` gives each card a share of both experts' weights: of \
57 GB, 7 on each of eight cards. Without it, the expert that is not in use waits in the host's memory if a card is too \
small for both. The text encoder runs where a prompt is predicted to be encoded sooner: on the host's CPU, or on the \
NPUs, where it takes 1.4 GB of each of eight. T5_LOAD_CPU in ComfyUI's environment sets the place (1: CPU, 0: NPUs).""",
    "{两个模型}": """\
两个采样器分担 20 步，每个专家一个。“FSDP 权重分片”让每张卡只保存两个专家权重的一部分：共 57 GB，8 卡时每卡约 7 GB；\
不开启时，若一张卡放不下两个专家，空闲的专家保存在主机内存中。文本编码器会在预计更快的位置运行：主机 CPU，\
或各 NPU（8 卡时每卡占用 1.4 GB）；也可用 ComfyUI 的环境变量 T5_LOAD_CPU 指定（1：CPU，0：NPU）。""",
}

NOTES = {
    "stock_hunyuan_video_text_to_video": """\
## HunyuanVideo with core's nodes

{files}

{stock} The model takes 26 GB in bfloat16: with less memory, several cards share the weights. Tencent's licence \
excludes the EU, the UK and South Korea.

{原生}模型以 bfloat16 占 26 GB，显存不足时多张卡会自动分摊权重。腾讯的许可证不适用于欧盟、英国和韩国。
""",
    "stock_wan2.2_i2v_a14b_image_to_video": """\
## Wan2.2-I2V-A14B with core's nodes

{files}

{stock}

{two models}

{原生}

{两个模型}
""",
    "stock_wan2.2_t2v_a14b_text_to_video": """\
## Wan2.2-T2V-A14B with core's nodes

{files}

{stock}

{two models}

{原生}

{两个模型}
""",
    "stock_wan2.2_ti2v_5b_text_to_video": """\
## Wan2.2-TI2V-5B with core's nodes

{files}

{stock} To begin the video with an image, connect Load Image to start_image of Wan22ImageToVideoLatent.

{原生}将“加载图像”连到 Wan22ImageToVideoLatent 的 start_image，即可图生视频。
""",
    "hunyuan_video_text_to_video": """\
## HunyuanVideo, from text

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. 0 in Ascend \
Sampler is the original's setting: 50 steps, shift 7, embedded guidance 6, and cfg 1, so there is no negative prompt. \
{sizes}

下载上表中的文件，按 **R** 刷新后点击**运行**。并行配置全部为 0 时使用所有可见的卡。采样器中的 0 为官方设置：50 步、\
shift 7、嵌入式引导 6、cfg 1（因此没有负面提示词）。{尺寸}
""",
    "hunyuan_video_v1_image_to_video": """\
## HunyuanVideo, from an image (v1, 33 channels)

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. The image \
goes to two nodes: the text encoder reads it (`image_interleave` 2), and the model gets it as the first frame. As in \
the original, the first four frames are dropped after decoding: ImageFromBatch keeps 125 of 129. Delete that node to \
keep all. {sizes}

下载上表中的文件，按 **R** 刷新后点击**运行**。图像连到两个节点：文本编码器读取它（`image_interleave` 为 2），模型把它当作首帧。\
与官方代码一致，解码后丢弃前四帧：ImageFromBatch 保留 129 帧中的 125 帧；删除该节点即可保留全部帧。{尺寸}
""",
    "hunyuan_video_v2_image_to_video": """\
## HunyuanVideo, from an image (v2, first frame replaced)

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. The image \
goes to two nodes: the text encoder reads it (`image_interleave` 4), and it stays in the latent as the first frame, so \
the video begins with it. For larger movements set `shift` to 17 in Ascend Sampler; 0 is 7. {sizes}

下载上表中的文件，按 **R** 刷新后点击**运行**。图像连到两个节点：文本编码器读取它（`image_interleave` 为 4），同时它作为首帧保留在 \
Latent 中，因此视频从这张图像开始。希望动作更大时，可将采样器的 shift 设为 17（0 表示 7）。{尺寸}
""",
    "tiny_wan_text_to_video": """\
## A first video, without a download

Press **Run**. The ranks start with the first video and stay for the next ones. Any machine will do, a CPU too.

The embedded model is small: 64 x 64 pixels, 17 frames, one shape that moves. It knows sentences like \
`a red circle moving right on a blue background`, made of these words:

| shape | colour | moving | background |
|---|---|---|---|
| circle, square, triangle | red, green, yellow, white, cyan | left, right, up, down | black, gray, blue, purple |

点击**运行**即可，无需下载：任何机器（包括 CPU）都能生成。提示词请用上表中的英文词。
""",
    "tiny_wan_fast_text_to_video": """\
## The same video with a part of the work left out

Press **Run**, then read below the sampler what was saved. Ascend Step Cache leaves out steps in which little changes; \
Ascend RainFusion, chained to it, thins out the attention of large videos (in one as small as this there is nothing \
to leave out). `preset` goes from quality to fast. Ascend AttentionCache or Ascend Block Cache can take the step \
cache's place; two caches exclude each other. The nodes fit any model of the other templates: connect them to \
Ascend Sampler.

点击**运行**，然后在采样器下方查看节省了多少。步缓存省去变化不大的步；串接的 RainFusion 让大视频的注意力变稀疏\
（这样小的视频没有可省的）。预设从 quality 到 fast 依次变快。也可换成 AttentionCache 或块缓存，但两种缓存不能同时使用。\
这些节点适用于其他模板中的任何模型：接到昇腾采样器即可。
""",
    "wan2.2_t2v_a14b_text_to_video": """\
## Wan2.2-T2V-A14B

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. The settings \
are the original's: 40 steps, shift 12, cfg 4 and, for the low-noise expert, 3. Other sizes: 1280 x 720, or any \
multiples of 16; length 4n+1. Files with fp16 for fp8_scaled in their names work as well, and so does the diffusers \
folder, chosen in all three loaders with `none` for the low-noise model.

{memory}

下载上表中的文件，按 **R** 刷新后点击**运行**。并行配置全部为 0 时使用所有可见的卡。采样器为官方设置：40 步、shift 12、\
cfg 4（低噪声专家为 3）。尺寸还可用 1280 x 720，或 16 的任意倍数；帧数为 4n+1。也可使用文件名中为 fp16 的版本；\
或在三个加载器中选择 diffusers 目录，并将“低噪声专家模型”设为 `none`。

{内存}
""",
    "wan2.1_flf2v_14b_first_last_frame_to_video": """\
## Wan2.1-FLF2V-14B

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. Choose the \
first and the last frame. 0 in Ascend Sampler is the original's setting: 50 steps, cfg 5, shift 16. It was trained \
for 1280 x 720: smaller videos come out worse.

下载上表中的文件，按 **R** 刷新后点击**运行**。请选择首帧与尾帧。采样器中的 0 为官方设置：50 步、cfg 5、\
shift 16。模型按 1280 x 720 训练，更小的尺寸效果较差。
""",
    "wan2.1_i2v_14b_image_to_video": """\
## Wan2.1-I2V-14B

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. 0 in Ascend \
Sampler is the original's setting: 40 steps, cfg 5, shift 3 (5 above 832 x 480). For 1280 x 720 take \
`wan2.1_i2v_720p_14B_fp16.safetensors`, from the same place, and set that size. Give it an image of the video's \
shape: others are cropped.

下载上表中的文件，按 **R** 刷新后点击**运行**。采样器中的 0 为官方设置：40 步、cfg 5、\
shift 3（大于 832 x 480 时为 5）。要生成 1280 x 720，\
请换用同一仓库的 `wan2.1_i2v_720p_14B_fp16.safetensors` 并修改尺寸。
""",
    "wan2.1_t2v_1.3b_text_to_video": """\
## Wan2.1-T2V-1.3B

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. cfg 6 and \
shift 8 are what its authors recommend for this small model; 0 in Ascend Sampler is the model's own. It was trained \
for 832 x 480.

下载上表中的文件，按 **R** 刷新后点击**运行**。cfg 6 与 shift 8 为官方对该小模型的建议值；\
采样器中的 0 表示模型的默认值。训练尺寸为 832 x 480。
""",
    "wan2.1_t2v_14b_text_to_video": """\
## Wan2.1-T2V-14B

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. 0 in Ascend \
Sampler is the original's setting: 50 steps, cfg 5, shift 5. Other sizes: 1280 x 720, or any multiples of 16; length \
4n+1.

下载上表中的文件，按 **R** 刷新后点击**运行**。采样器中的 0 为官方设置：50 步、cfg 5、shift 5。\
尺寸还可用 1280 x 720，或 16 的任意倍数；帧数为 4n+1。
""",
    "wan2.2_i2v_a14b_image_to_video": """\
## Wan2.2-I2V-A14B

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. 20 steps, \
as ComfyUI's own template has it, take half the time of the original's 40, which 0 asks for. The other zeros in \
Ascend Sampler are the original's cfg 3.5 and shift 5. Other sizes: 1280 x 720, or any multiples of 16. Files with \
fp16 for fp8_scaled in their names work as well.

{memory}

下载上表中的文件，按 **R** 刷新后点击**运行**。20 步与 ComfyUI 官方模板相同，耗时为原版 40 步（填 0）的一半；\
其余的 0 为原版设置：cfg 3.5、shift 5。尺寸还可用 1280 x 720。

{内存}
""",
    "wan2.2_i2v_a14b_image_to_video_4_steps": """\
## Wan2.2-I2V-A14B in 4 steps

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. LightX2V's \
LoRAs, one for each expert, make the video in 4 steps. They were trained for cfg 1, shift 5 and these steps: leave \
Ascend Sampler as it is. With cfg 1 the negative prompt is not used.

{memory}

下载上表中的文件，按 **R** 刷新后点击**运行**。LightX2V 的两个 LoRA（每个专家一个）只需 4 步。\
它们按 cfg 1、shift 5 训练，请保持采样器设置不变；cfg 为 1 时不使用负面提示词。

{内存}
""",
    "wan2.2_ti2v_5b_image_to_video": """\
## Wan2.2-TI2V-5B, from an image

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. 0 in Ascend \
Sampler is the original's setting: 50 steps, cfg 5, shift 5. It was trained for 1280 x 704 at 24 frames a second; \
sizes are multiples of 32. An image of another shape is cropped.

下载上表中的文件，按 **R** 刷新后点击**运行**。采样器中的 0 为官方设置：50 步、cfg 5、shift 5。\
按 1280 x 704、每秒 24 帧训练；尺寸须为 32 的倍数。
""",
    "wan2.2_ti2v_5b_text_to_video": """\
## Wan2.2-TI2V-5B, from text

{files}

Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card. 0 in Ascend \
Sampler is the original's setting: 50 steps, cfg 5, shift 5. It was trained for 1280 x 704 at 24 frames a second; \
sizes are multiples of 32. Connect a Load Image to start_image, and the video begins with it.

下载上表中的文件，按 **R** 刷新后点击**运行**。采样器中的 0 为官方设置：50 步、cfg 5、shift 5。\
按 1280 x 704、每秒 24 帧训练；尺寸须为 32 的倍数。将“加载图像”连到 start_image 即为图生视频。
""",
}


def main():
    with ComfyServer() as server, ComfyBrowser(server) as browser:
        for api in sorted((WORKFLOWS / "api").glob("*.json")):
            prompt = json.loads(api.read_text())
            browser.open(prompt)
            graph = with_note(browser.graph(), NOTES[api.stem])
            arrange(graph)
            browser.open(graph)  # as it will be opened: the page adds defaults when it saves
            workflow = tidied(browser.graph())
            assert without_titles(browser.prompt()) == without_titles(prompt), f"{api}: the page made another prompt"
            target = WORKFLOWS / api.name
            target.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
            print(target.relative_to(REPOSITORY))


def published(node):
    """The files that a node of a UI-format graph loads, in the form of ComfyUI's page: name, folder, URL."""
    values = node.get("widgets_values") or []
    names = [value for value in values if isinstance(value, str) and value.endswith(".safetensors")]
    files = [(name, folder_of(node["type"], name)) for name in names if node["type"] in FOLDERS]
    return [{"name": name, "url": HUGGING_FACE.format(repository(name), folder, name), "directory": folder}
            for name, folder in files]


def folder_of(node_type, name):
    """The folder of ComfyUI's models from which a node of this type loads a file."""
    return "clip_vision" if name == VISION else FOLDERS[node_type]


def repository(name):
    """Where Comfy-Org publishes a file."""
    return next((place for begin, place in REPOSITORIES.items() if name.startswith(begin)), OLDEST)


def with_note(graph, text):
    """Adds a note to the graph: the text, with {files} replaced by a table of the files that the graph loads, and the
    texts of STOCK, MEMORY and SIZES."""
    rows = ["| download | | into `ComfyUI/models` |", "|---|---|---|"]
    for file in (file for node in graph["nodes"] for file in published(node)):
        name, folder = file["name"], file["directory"]
        other = MODELSCOPE.format(repository(name), folder, name)
        rows.append(f"| {name} | [Hugging Face]({file['url']}), [ModelScope]({other}) | {folder} |")
    for mark, words in {"{files}": "\n".join(rows), **STOCK, **MEMORY, **SIZES}.items():
        text = text.replace(mark, words)
    number = max(node["id"] for node in graph["nodes"]) + 1
    graph["nodes"].append({"id": number, "type": NOTE, "pos": [0, 0], "size": [0, 0], "flags": {}, "mode": 0,
                           "order": 0, "inputs": [], "outputs": [], "title": "Read me", "properties": {},
                           "widgets_values": [text]})
    graph["last_node_id"] = number
    return graph


def tidied(graph):
    """The graph without what changes with each save, with its upper left corner in view."""
    graph["extra"] = {"ds": {"scale": 0.6, "offset": [120, 340]}}
    graph.pop("id", None)
    for node in graph["nodes"]:
        models = published(node)
        node["properties"] = {"Node name for S&R": node["type"]} | ({"models": models} if models else {})
        for slot in node.get("inputs", []) + node.get("outputs", []):
            slot.pop("localized_name", None)
    return graph


def without_titles(prompt):
    return {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in prompt.items()}


if __name__ == "__main__":
    main()
