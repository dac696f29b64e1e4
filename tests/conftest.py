"""Fixtures that tests share: small checkpoints, and groups of ranks that live as long as the tests."""

import os
import random
import uuid
from pathlib import Path

# On some processors MKL adds up in another order where the same numbers lie elsewhere in memory; tests of equal bits
# want one. It is read when MKL first computes, in whatever process.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime, TextEncoderSpec, VaeSpec
from ascend_runtime.specs.cluster import FOLDER_VARIABLE
from scripts.lib.comfy_server import ComfyServer
from rank_processes import processes_with
from xdist.scheduler import LoadScopeScheduling

os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # the networks are small, and the ranks need the cores


def pytest_addoption(parser):
    parser.addoption("--all-accelerators", action="store_true", help="each plan with each cache, not with some of them")
    parser.addoption("--all-benchmarks", action="store_true", help="10 benchmarks, each shortened, instead of 1")
    parser.addoption("--all-broken-files", action="store_true", help="800 broken files instead of 80")
    parser.addoption("--all-files", action="store_true", help="each type of GGUF's and ComfyUI's weights, not some")
    parser.addoption("--all-hosts", action="store_true", help="every workflow on all simulated cards, not one")
    parser.addoption("--all-commands", action="store_true", help="each command of README and docs/, not one")
    parser.addoption("--all-hostile-files", action="store_true", help="216 hostile files and folders instead of 20")
    parser.addoption("--all-kills", action="store_true", help="43 kills of ranks and clients instead of a sample")
    parser.addoption("--all-cancels", action="store_true", help="170 cancels instead of 17, and their times")
    parser.addoption("--all-pages", action="store_true", help="each template, help and task of a user in the page")
    parser.addoption("--all-saved-workflows", action="store_true", help="each workflow as once shipped, not a sample")
    parser.addoption("--all-silences", action="store_true", help="ranks that hang in all kinds of work, not in some")
    parser.addoption("--comfy-cli", action="store_true", help="comfy-cli installs the pack into a fresh ComfyUI")
    parser.addoption("--soak", action="store_true", help="2,000 mixed jobs in a row instead of 100")
    parser.addoption("--all-loras", action="store_true", help="LoRAs on all kinds of quantized weights, not on five")
    parser.addoption("--all-machines", action="store_true", help="every plan, death and stranger over several hosts")
    parser.addoption("--all-memory", action="store_true", help="the memory of 30 jobs instead of 5")
    parser.addoption("--all-messages", action="store_true", help="20,000 hostile messages each way instead of some")
    parser.addoption("--all-stock", action="store_true", help="stock graphs on more plans, all samplers, templates")
    parser.addoption("--all-tiles", action="store_true", help="VAE tiles on 1 to 8 ranks, instead of some of these")
    parser.addoption("--msmodelslim", action="store_true", help="has msModelSlim write folders, and loads them")
    parser.addoption("--all-plans", action="store_true", help="all options of each plan for 2 to 8 ranks, not one")


def pytest_terminal_summary(terminalreporter):
    """What tests of this run want to be read, although they passed: `record_property("shown", text)`."""
    reports = terminalreporter.getreports("passed")
    for text in sorted(value for report in reports for name, value in report.user_properties if name == "shown"):
        terminalreporter.write_line(text)


LANES = ("ranks", "comfyui", "machines")  # folders of tests
APART = ("test_contract.py",)  # files of tests


class Lanes(LoadScopeScheduling):
    """A worker takes all files of a folder of LANES, one after the other, as their tests start many processes, keep
    what they started for the next ones, and some measure time. Other files are taken by whoever is free, and so is each
    test of APART, which takes minutes."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if Path(file).name in APART:
            return nodeid
        folder = Path(file).parent.name
        return folder if folder in LANES else file


def pytest_collection_modifyitems(items):
    """The longest work begins first: at the end, no worker waits for another one's minutes."""

    def place(item) -> int:
        return 0 if item.path.parent.name in LANES else 1 if item.path.name in APART else 2

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Lanes(config, log)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`checkpoints(**form)`: the folder of a small checkpoint of that form (see tiny_models.wan_pipeline)."""
    made = {}

    def checkpoint(**form) -> Path:
        key = tuple(sorted(form.items()))
        if key not in made:
            made[key] = tiny_models.save(tiny_models.wan_pipeline(**form), tmp_path_factory.mktemp("checkpoint"))
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def checkpoint(checkpoints) -> Path:
    return checkpoints()


@pytest.fixture
def rng():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


# Ranks and tests share few cores: threads that wait must not burn them.
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """The bytes of each read of a file, as they come."""
    counts = []
    monkeypatch.setattr(os, "preadv", lambda *given, call=os.preadv: counts.append(call(*given)) or counts[-1])
    return counts


@pytest.fixture(scope="session")
def new_runtime():
    """`new_runtime(n)`: a group of n ranks on the CPU, not started yet; the caller stops it."""

    def runtime(ranks: int, **environment: str) -> Runtime:
        return Runtime(ParallelSpec(ranks=ranks), device="cpu", environment={**RANK_ENVIRONMENT, **environment})

    return runtime


@pytest.fixture(scope="session")
def runtimes(new_runtime):
    """`runtimes(n)`: the group of n ranks that all tests share."""
    started = {}

    def runtime(ranks: int) -> Runtime:
        if ranks not in started:
            started[ranks] = new_runtime(ranks)
            started[ranks].start()
        return started[ranks]

    yield runtime
    for group in started.values():
        group.stop()


@pytest.fixture
def marked():
    """(environment of a process and all that it starts, a function: their pids by rank, None for no rank)."""
    variable, value = "ASCEND_TEST_MARKER", uuid.uuid4().hex
    return {variable: value}, lambda: processes_with(variable, value)


@pytest.fixture(scope="session")
def one_rank(runtimes) -> Runtime:
    return runtimes(1)


@pytest.fixture(scope="session")
def two_ranks(runtimes) -> Runtime:
    return runtimes(2)


class Specs:
    """The descriptions of a checkpoint's components, and inputs that fit them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = DiffusionModelSpec(path=str(folder))
        self.encoder = TextEncoderSpec(path=str(folder))
        self.vae = VaeSpec(path=str(folder))

    @staticmethod
    def text(seed: int, batch: int = 1) -> torch.Tensor:
        """An embedding [B, 512, D] as an encoder could have made it: 20 tokens, zeros behind them."""
        embedding = torch.zeros(batch, 512, tiny_models.TEXT_DIM)
        embedding[:, :20] = torch.randn(batch, 20, tiny_models.TEXT_DIM, generator=torch.Generator().manual_seed(seed))
        return embedding


@pytest.fixture(scope="session")
def specs_of():
    return Specs


@pytest.fixture(scope="session")
def specs(checkpoint) -> Specs:
    return Specs(checkpoint)


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory, checkpoint):
    """A ComfyUI with the pack, nodes for tests, and random models in its folders (see comfy_graphs, random_wan)."""
    base = tmp_path_factory.mktemp("comfyui")
    folders = base / "models" / "diffusers"
    folders.mkdir(parents=True)
    (folders / "random_wan").symlink_to(checkpoint)
    random_wan.heavy_transformer(folders / "heavy_wan")
    random_wan.wide_text_encoder(folders / "wide_text_encoder")
    files = base / "models" / "diffusion_models"
    random_wan.original_transformer(files / "original_wan.safetensors")
    random_wan.original_transformer(files / "original_i2v.safetensors", channels=36, image=True)
    random_wan.original_transformer(files / "original_i2v_22.safetensors", channels=36)
    random_wan.ti2v(files / "original_ti2v.safetensors", folders / "ti2v_wan")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "test_nodes").symlink_to(Path(__file__).parent / "helpers" / "comfy_nodes")
    random_wan.single_files(base / "models")
    # OpenMP as for the ranks; and no clusters but those that tests make.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", FOLDER_VARIABLE: str(base / "clusters")}
    with ComfyServer(base=base, env=environment) as server:
        yield server
