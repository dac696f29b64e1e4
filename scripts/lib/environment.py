"""Makes a virtual environment with the right torch, which later installs do not replace. Standard library only.

Which torch, in this order:
1. the host's, if the base Python has torch_npu or a CUDA build of torch: the environment then builds on that Python,
   without writing to it;
2. if an NVIDIA GPU is present: PyPI's build of the torch in constraints.txt;
3. else from PyTorch's CPU index, if it can be reached;
4. else whatever pip finds for the torch in constraints.txt (a local wheel, or PyPI's build).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = REPOSITORY / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_TORCH, NEWEST_TORCH = (2, 7), (2, 13)
TORCH_PACKAGES = ("torch", "torchvision", "torchaudio")
STAMPS = "ascend-video.json"  # in the environment: the installed sets, with a hash of their requirements

# Run by a host's Python: prints its torch, its accelerator and the folders of its packages, without importing them.
_INSPECT = """
import importlib.metadata, importlib.util, json, runpy, sys
has = importlib.util.find_spec
version = lambda name: importlib.metadata.version(name) if has(name) else None
print(json.dumps({
    "python": sys.executable,
    "torch": version("torch"), "torchvision": version("torchvision"), "torchaudio": version("torchaudio"),
    "cuda": has("torch") and runpy.run_path(has("torch").submodule_search_locations[0] + "/version.py").get("cuda"),
    "npu": bool(has("torch_npu")),
    "packages": [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))],
}))
"""

# Appended to PyPI's torchvision, whose operators need CUDA libraries: without them even its import fails.
_TORCHVISION_PATCH = """

if not _has_ops():  # declare the operators whose absence stops the import; calling one still fails
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class SetupError(Exception):
    """Why the set-up failed, and what the user can do."""


def say(text):
    print(f"==> {text}", flush=True)


@contextlib.contextmanager
def step(text):
    """Prints what is done, then how long it took."""
    say(text)
    began = time.monotonic()
    yield
    say(f"    done in {time.monotonic() - began:.0f} s")


@contextlib.contextmanager
def lock():
    """One set-up at a time in this repository."""
    folder = REPOSITORY / ".cache"
    folder.mkdir(exist_ok=True)
    with open(folder / "setup.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def inspect(python):
    """The packages of `python`: a dict of python (path), torch, torchvision, torchaudio, cuda (versions or None), npu
    (bool), packages (folders)."""
    answer = subprocess.run([str(python), "-c", _INSPECT], capture_output=True, text=True)
    if answer.returncode:
        raise SetupError(f"{python} cannot list its packages:\n{answer.stderr.strip()}")
    return json.loads(answer.stdout)


def accelerated_host(python):
    """`inspect(python)` if its torch is supported and uses an NPU or GPU; None if the machine has none."""
    host = inspect(python)
    has_npu = bool(list(Path("/dev").glob("davinci[0-9]*"))) or shutil.which("npu-smi")
    if has_npu and not (host["torch"] and host["npu"]):
        raise SetupError(f"this machine has NPUs, but {host['python']} has no torch with torch_npu. Name the Python "
                         "that has them, as in PYTHON=/path/to/python3")
    if not (host["torch"] and (host["npu"] or host["cuda"])):
        return None
    version = tuple(int(part) for part in host["torch"].split(".")[:2])
    if OLDEST_TORCH <= version <= NEWEST_TORCH:
        return host
    problem = (f"torch {host['torch']} of {host['python']} is not supported: it must be "
               f"{'.'.join(map(str, OLDEST_TORCH))} to {'.'.join(map(str, NEWEST_TORCH))}")
    if has_npu:
        raise SetupError(f"{problem}. Name another Python by PYTHON=/path/to/python3")
    say(f"{problem}; taking another torch into .venv")
    return None


class Environment:
    """The virtual environment in `folder`, on top of the Python that `host` describes (see `inspect`), or
    standalone."""

    def __init__(self, folder, host=None):
        self.folder, self.host = Path(folder), host
        self.python = self.folder / "bin" / "python"
        self.constraints = self.folder / "constraints.txt"

    def make(self, base=sys.executable):
        """Creates it if it does not exist, and installs torch."""
        if not (self.folder / "bin" / "pip").exists():  # the last file that venv makes
            with step(f"making {_shown(self.folder)} with {base}"):
                made = subprocess.run([base, "-m", "venv", str(self.folder)], capture_output=True, text=True)
                if made.returncode:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    raise SetupError(f"{base} -m venv failed (Debian and Ubuntu: apt-get install python3-venv):\n"
                                     f"{made.stdout.strip()}\n{made.stderr.strip()}")
        if self.host:
            self._lie_over_host()
        elif not inspect(self.python)["torch"]:
            self._install_torch()
        self._hold_torch()

    def replace_torch(self, version):
        """Installs this version of torch, which hides the host's, unless it is installed."""
        if inspect(self.python)["torch"].partition("+")[0] != version:
            self.constraints.write_text(f"torch=={version}\n")
            with step(f"installing torch {version}"):
                self._pip(f"torch=={version}", *self._cpu_index())
            self._hold_torch()

    def install(self, name, requirements, *options):
        """Installs `requirements` (lines of a requirements file) as the set called `name`, unless they are installed.

        `options`: further options of pip.
        """
        self._once(name, requirements, lambda: self._install_lines(name, requirements, *options))

    def download(self, requirement, sha256, folder):
        """Downloads a pinned wheel from PyPI into `folder`, without what it requires; pip checks its hash.

        Returns its path. Raises SetupError if pip cannot fetch it.
        """
        pinned = Path(folder) / "pinned.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [str(self.python), "-m", "pip", "download", "-qq", "--no-deps", "--require-hashes",
                   "--disable-pip-version-check", "-d", str(folder), "-r", str(pinned)]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise SetupError(f"pip could not fetch {requirement}; its messages are above")
        return next(Path(folder).glob("*.whl"))

    def install_torch_companions(self):
        """Installs torchvision and torchaudio for ComfyUI if they are missing, so that they can be imported with any
        torch."""
        there = inspect(self.python)
        minor, patch = map(int, re.match(r"2\.(\d+)\.(\d+)", there["torch"]).groups())
        if not there["torchvision"]:
            with step("installing torchvision for ComfyUI"):  # 0.(y+15).z is built for torch 2.y.z
                index = self._cpu_index() if "+cpu" in there["torch"] else []
                self._pip("--no-deps", f"torchvision==0.{minor + 15}.{patch}", *index)
        if not there["torchaudio"]:
            with step("installing torchaudio for ComfyUI"):  # 2.11.0 is the last version
                self._pip("--no-deps", f"torchaudio==2.{minor}.{patch}" if minor < 11 else "torchaudio==2.11.0")
        self._mend_torch_companions()
        self._hold_torch()

    def _mend_torch_companions(self):
        """Makes our torchvision and torchaudio importable if their binaries do not fit the installed torch."""
        for binary in (self._library() / "torchaudio").rglob("*.so"):  # optional, and ComfyUI does not need them
            binary.unlink()
        extension = self._library() / "torchvision" / "extension.py"
        if extension.exists() and _TORCHVISION_PATCH not in extension.read_text():
            with open(extension, "a") as file:
                file.write(_TORCHVISION_PATCH)

    def _hold_torch(self):
        """Keeps pip from replacing the installed torch."""
        there = inspect(self.python)
        self.constraints.write_text("".join(f"{name}=={there[name]}\n" for name in TORCH_PACKAGES if there[name]))

    def _lie_over_host(self):
        """Adds the host's packages after the environment's own."""
        lines = [f"import site; site.addsitedir({path!r})" for path in self.host["packages"]]
        (self._library() / "host.pth").write_text("\n".join(lines) + "\n")

    def _install_torch(self):
        wanted = next(line for line in requirement_lines(CONSTRAINTS) if line.startswith("torch=="))
        self.constraints.write_text(CONSTRAINTS.read_text())
        index = self._cpu_index()
        if shutil.which("nvidia-smi"):
            say(f"an NVIDIA GPU is present: taking PyPI's build of {wanted} (several GB)")
        elif index:
            say(f"taking {wanted} from PyTorch's CPU index")
        else:
            say(f"PyTorch's CPU index cannot be reached; taking what pip finds: {self._found(wanted)}")
        with step(f"installing {wanted}"):
            self._pip(wanted, *index)

    def _install_lines(self, name, requirements, *options):
        with step(f"installing what {name} needs"):
            file = self.folder / "requested.txt"
            file.write_text("\n".join(requirements) + "\n")
            self._pip(*options, "-r", str(file))

    def _cpu_index(self):
        """pip's arguments for PyTorch's CPU index; empty if a GPU is present or the index cannot be reached."""
        if shutil.which("nvidia-smi"):
            return []
        try:
            urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=10).close()
        except OSError:
            return []
        return ["--index-url", CPU_INDEX]

    def _found(self, wanted):
        """A description of the file that pip would install for a requirement; says that PyPI's build is large."""
        report = self.folder / "report.json"
        self._pip("--dry-run", "--no-deps", "--report", str(report), wanted, quiet=True)
        url = json.loads(report.read_text())["install"][0]["download_info"]["url"]
        report.unlink()
        name = url.rsplit("/", 1)[-1].replace("%2B", "+")
        return name if "+cpu" in name else f"PyPI's build {name} (several GB with the libraries that it names)"

    def _once(self, name, inputs, action):
        """Runs `action`, unless a stamp says that it was done for the same inputs."""
        stamps = self.folder / STAMPS
        done = json.loads(stamps.read_text()) if stamps.exists() else {}
        digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
        if done.get(name) == digest:
            return
        action()
        done[name] = digest
        stamps.write_text(json.dumps(done, indent=1))

    def _pip(self, *arguments, quiet=not sys.stdout.isatty()):
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input",
                   *(["-qq"] if quiet else []), "-c", str(self.constraints), *arguments]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise SetupError(f"this command failed; its messages are above:\n{' '.join(command)}")

    def _library(self):
        return next((self.folder / "lib").glob("python3.*")) / "site-packages"


def requirement_lines(file):
    """The lines of a requirements file including its `-r` files, without comments."""
    lines = []
    for line in Path(file).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            lines += requirement_lines(Path(file).parent / line[3:].strip())
        elif line:
            lines.append(line)
    return lines


def _shown(path):
    return os.path.relpath(path, REPOSITORY)
