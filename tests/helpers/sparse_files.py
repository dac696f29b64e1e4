"""Files of weights with real headers, whose data are holes: for what reads names and shapes, and no weight."""

import json
import os

NAMES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}  # of safetensors
SHARD = 4 * 10**9  # bytes; a host may refuse to map more than it has memory


def write_sparse_shards(folder, tensors, dtype):
    """Writes safetensors files and their index, as diffusers does, that take no room on disk. All values are zero."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * dtype.itemsize
        if size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name], size = tensor, size + nbytes
    stem = "diffusion_pytorch_model"
    files = {f"{stem}-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        _write(folder / file, shard, dtype)
    index = {"metadata": {}, "weight_map": {name: file for file, shard in files.items() for name in shard}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _write(path, tensors, dtype):
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[str(dtype).removeprefix("torch.")], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + end)
