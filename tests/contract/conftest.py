"""Fixtures of the contract tests, which run in an environment of their own (see run.py) and nowhere else."""

import json
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

inside = "STUB_SOC" in os.environ  # as run.py starts pytest
collect_ignore_glob = [] if inside else ["test_*.py"]
OF_950 = {"a5", "Ascend950PR_9589", "mx", "W8A8_MXFP8"}  # as tests' parameters


def pytest_collection_modifyitems(items):
    """Skips what plays a card of the 950 series where torch_npu does not know it, as those for CANN 8.5."""
    if not inside:
        return
    import versions  # noqa: PLC0415 - imports torch_npu

    if versions.KNOWS_950:
        return
    reason = f"torch_npu {metadata.version('torch_npu')} does not know the 950 series"
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params.values()
        if item.get_closest_marker("a5") or OF_950 & set(map(str, values or ())):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def older_kernels():
    """What torch_npu for CANN 8.5 leaves to a device: the shape of npu_layer_norm_eval; its conversions on a CPU."""
    import torch  # noqa: PLC0415 - brings torch_npu
    import versions  # noqa: PLC0415

    library = torch.library.Library("npu", "IMPL")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("npu::npu_layer_norm_eval", "Meta"):
        library.impl("npu_layer_norm_eval", lambda input, *_, **__: torch.empty_like(input), "Meta")
    if not versions.KNOWS_950:
        library.impl("_npu_dtype_cast", lambda input, dtype: input.to(dtype), "CPU")
    yield
    library._destroy()


def pytest_configure(config):
    config.addinivalue_line("markers", "a5: plays a card of the 950 series")


def pytest_report_header():
    return None if inside else "tests/contract is left out: bash scripts/test.sh tests/contract runs it"


@pytest.fixture(scope="session")
def zygote():
    """A process that forks itself to run code; see zygote.py."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("zygote.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="session")
def python_on(zygote):
    """`python_on(soc, code, devices=1)`: what `code` prints, in a process of its own on such (fake) devices, which has
    torch, torch_npu and the package imported.

    With `variables`, which torch_npu may read as early as that, one that imports them first.
    """

    def run(soc, code, devices=1, variables=None):
        code, stubs = textwrap.dedent(code), {"STUB_SOC": soc, "STUB_DEVICES": str(devices)}
        done = _started(code, stubs | variables) if variables else _forked(zygote, code, stubs)
        assert done["code"] == 0, f"on {soc}: {done['err'][-4000:]}"
        return done["out"].strip()

    return run


def _forked(zygote, code, environment):
    print(json.dumps({"code": code, "environment": environment}), file=zygote.stdin, flush=True)
    return json.loads(zygote.stdout.readline())


def _started(code, environment):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}
