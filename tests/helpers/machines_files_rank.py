"""Ranks that pretend to be on two machines, each with its own folder (see tests/files/test_machines_files.py).

FOLDER has atlas1/models and atlas2/disk/models: two copies of models and a LoRA, which a client has in /models. Ranks
0 and 1 are on atlas1, rank 2 on atlas2, and all serve jobs as a client's ranks do.
"""

import os
import shutil
from contextlib import contextmanager

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, TextEncoderSpec, VaeSpec
from ascend_runtime.checkpoints import digest
from ascend_runtime.engine import serve
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.engine.same_files import comparison
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.parallel.machines import know_machines, machines
from ascend_runtime.parallel.mesh import all_alike
from ascend_runtime.specs.paths import with_paths
from ascend_runtime.wire import messages

HERE = {"atlas1": "atlas1/models", "atlas2": "atlas2/disk/models"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"


class Client:
    """A channel to a client that sends one message, and keeps the answers."""

    def __init__(self):
        self.answers, self.taken = [], None

    def receive(self):
        return self.message

    def take(self):
        taken, self.taken = self.taken, None
        return taken

    def send(self, message):
        if isinstance(message, (messages.Done, messages.Failed)):
            self.answers.append(message)


class Rank:
    def __init__(self, folder, name):
        self.folder, self.name, self.client = folder, name, Client()
        self.pipeline = RankPipeline(torch.device("cpu"))
        self.root = folder / HERE[name]
        self.place({"/models": str(self.root)})

    def place(self, paths):
        self.client.message = messages.Located(machine=self.name, paths=paths)
        assert serve._serve_one(self.client, self.pipeline)

    def answer(self, message):
        self.client.message = message
        dist.barrier()  # files are as they should be
        assert serve._serve_one(self.client, self.pipeline)
        dist.barrier()
        return self.client.answers.pop()

    def runs(self, message):
        answer = self.answer(message)
        assert isinstance(answer, messages.Done), answer
        return answer

    def refused(self, message):
        """The error that all ranks raise alike, as a client shows it."""
        answer = self.answer(message)
        assert isinstance(answer, messages.Failed) and answer.kind == "user", answer
        error = answer.error.replace(f"On {self.name}: ", "", 1) if self.name != "atlas1" else answer.error
        assert all_alike(error), error
        return error

    @contextmanager
    def on(self, name, file):
        """A file of a machine, which the code inside changes there, and only there; afterwards it is as before."""
        file = self.root / file
        here = self.name == name and machines().is_first
        if here and file.is_file():
            shutil.copy(file, self.folder / f"kept by {name}")
        kept = here and file.is_file()
        yield file if here else None
        if kept:
            shutil.copy(self.folder / f"kept by {name}", file)


def load(**what):
    return messages.Load(job=1, parallel=ParallelSpec(ranks=3, ulysses_degree=3, fsdp=False), **what)


MODEL = DiffusionModelSpec(path="/models/wan")
VAE = VaeSpec(path="/models/wan")
ENCODER = TextEncoderSpec(path="/models/wan", placement="ranks")
OTHER = DiffusionModelSpec(path="/models/other")
EXPERTS = DiffusionModelSpec(path="/models/wan", low_noise_path="/models/other", boundary=0.9)
SHARDED = DiffusionModelSpec(path="/models/sharded")
LORA = LoraSpec(path="/models/lora.safetensors", strength=0.5)


def main():
    torch.set_grad_enabled(False)
    folder, number, _ = gloo_ranks.join()
    name = "atlas1" if number < 2 else "atlas2"
    know_machines(name)
    rank = Rank(folder, name)
    if not machines().is_first:
        comparison.listing = None  # only the first rank of a machine reads samples
    equal_files(rank)
    other_files(rank)
    missing_files(rank)
    changed_while_it_was_read(rank)
    names_that_decide(rank)
    two_models_by_turns(rank)
    what_ends_a_comparison(rank)
    dist.barrier()
    dist.destroy_process_group()


def equal_files(rank):
    """Pass, whatever the folders are called, and are read once."""
    sampled, pread = [], os.pread
    digest.os.pread = lambda *given: sampled.append(given) or pread(*given)
    job = Job(load(), rank.client, rank.pipeline.device)
    specs = with_paths([MODEL.with_lora(LORA), ENCODER, ENCODER.vision, VAE], rank.pipeline.folders)
    rank.pipeline.same_files.require(job, specs)
    assert bool(sampled) == machines().is_first
    sampled.clear()
    rank.pipeline.same_files.require(job, specs)
    assert not sampled
    digest.os.pread = pread
    rank.runs(load(model=MODEL.with_lora(LORA)))


def other_files(rank):
    """Each is refused by its names, on all ranks alike, and nothing of it is loaded."""
    held = rank.pipeline.components.models.in_use.model
    cases = [
        (f"wan/{WEIGHTS}", header, load(model=MODEL), "The content of "),
        (f"wan/{WEIGHTS}", last_byte, load(model=MODEL), "The content of "),
        (f"other/{WEIGHTS}", last_byte, load(model=EXPERTS), "The content of "),
        (f"sharded/{SHARD}", last_byte, load(model=SHARDED), "The content of "),
        ("wan/transformer/config.json", longer, load(model=MODEL), " bytes"),
        ("lora.safetensors", last_byte, load(model=MODEL.with_lora(LORA)), "The content of "),
        ("wan/vae/config.json", longer, load(vae=VAE), " bytes"),
        ("wan/vae/diffusion_pytorch_model.safetensors", last_byte, load(vae=VAE), "The content of "),
        ("wan/tokenizer/tokenizer.json", longer, load(encoder=ENCODER), " bytes"),
        ("wan/text_encoder/model.safetensors", last_byte, load(encoder=ENCODER), "The content of "),
        ("wan/ascend_defaults.json", longer, load(model=MODEL), " bytes"),
    ]
    for number, (file, change, message, said) in enumerate(cases):
        with rank.on(("atlas1", "atlas2")[number % 2], file) as changed:
            if changed:
                change(changed)
            error = rank.refused(message)
        assert error.startswith("AV-1907: ") and said in error, error
        for machine, root in HERE.items():
            assert f"{rank.folder / root / file} on {machine}" in error, error
    assert rank.pipeline.components.models.in_use.model is held and isinstance(held.high_noise, WanTransformer)
    rank.runs(load(model=MODEL.with_lora(LORA)))  # mended


def missing_files(rank):
    for machine, file, message, said in [
        ("atlas2", f"wan/{WEIGHTS}", load(model=MODEL), f"On atlas2: {rank.folder / HERE['atlas2']}"),
        ("atlas2", f"sharded/{SHARD}", load(model=SHARDED), f"lacks {SHARD.rpartition('/')[2]}, see "),
        ("atlas2", "wan/tokenizer/tokenizer_config.json", load(encoder=ENCODER), "atlas2 lacks "),
        ("atlas1", "wan/tokenizer/tokenizer_config.json", load(encoder=ENCODER), "atlas1 lacks "),
        ("atlas1", "lora.safetensors", load(model=MODEL.with_lora(LORA)), "On atlas1: There is no LoRA "),
        ("atlas1", "wan/vae/config.json", load(vae=VAE), "On atlas1: "),
    ]:
        with rank.on(machine, file) as missing:
            if missing:
                missing.unlink()
            error = rank.refused(message)
        assert error.startswith("AV-1907: ") and said in error, error
    gone = DiffusionModelSpec(path="/models/gone")
    answer = rank.answer(load(model=gone))  # of all machines: as on one
    assert answer.error.startswith("AV-1301: ") and ("On atlas2: " in answer.error) == (rank.name == "atlas2"), answer
    rank.place({})
    answer = rank.answer(load(model=MODEL))
    assert answer.error.startswith("AV-1301: ") and "/models/wan does not exist" in answer.error, answer
    rank.place({"/models": str(rank.root)})
    rank.runs(load(model=MODEL))


def changed_while_it_was_read(rank):
    """A file that changes after it was compared, and before a rank has read it."""
    read = rank.pipeline.components.get

    def late(spec, *given):
        if rank.name == "atlas2":
            last_byte(rank.root / "wan" / WEIGHTS)
        return read(spec, *given)

    with rank.on("atlas2", f"wan/{WEIGHTS}"):
        rank.pipeline.components.get = late
        answer = rank.answer(load(model=MODEL))
        rank.pipeline.components.get = read
    kind = "user" if rank.name == "atlas2" else "peer"
    assert answer.kind == kind and (kind == "peer" or answer.error.startswith("AV-1315: On atlas2: ")), answer
    rank.runs(load(model=MODEL))


def names_that_decide(rank):
    """A model whose name says that it was distilled, on one machine only."""
    name = "wan" if rank.name == "atlas1" else "wan-lightning-4steps"
    if machines().is_first:
        shutil.copytree(rank.root / "wan", rank.root / "named" / name)
        (rank.root / "named" / name / "ascend_defaults.json").unlink()
    rank.place({"/models/wan": str(rank.root / "named" / name)})
    error = rank.refused(load(model=MODEL))
    assert error.startswith("AV-1907: ") and "not distilled on atlas1 and " in error and ", 4 steps on atlas2" in error
    rank.place({"/models": str(rank.root)})


def two_models_by_turns(rank):
    """A model waits on all ranks, though its paths differ."""
    rank.runs(load(model=MODEL))
    rank.runs(load(model=OTHER))
    assert rank.pipeline.components.models.waiting.key.spec.path == str(rank.root / "wan")


def what_ends_a_comparison(rank):
    """A fault of the code, or a cancel, on one rank: no other waits for it."""
    listed = comparison.listing
    if rank.name == "atlas2":
        comparison.listing = None
    answer = rank.answer(load(model=MODEL))
    assert answer.kind == ("internal" if rank.name == "atlas2" else "peer"), answer
    comparison.listing = listed
    if rank.name == "atlas2":
        rank.client.taken = messages.Cancel(job=1)
    assert rank.answer(load(model=MODEL)).kind == "cancelled"
    rank.runs(load(model=MODEL))


def last_byte(file):
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([byte ^ 1]))


def header(file):
    """Of the same length, and still valid."""
    content = file.read_bytes()
    assert content.count(b'"format":"pt"') == 1
    file.write_bytes(content.replace(b'"format":"pt"', b'"format":"qt"'))


def longer(file):
    file.write_bytes(file.read_bytes() + b" ")
