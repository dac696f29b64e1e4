"""torch_npu and mindiesd over stub CANN libraries: they import, see devices, and take tensors there and back."""

import pytest
import torch

# The SoC's name by CANN, and what mindiesd makes of it. Ascend950 copies by an operator, and nothing computes here.
SOCS = {"Ascend910B4": "A2", "Ascend910_9391": "A3", "Ascend950PR_9589": "A5"}


@pytest.mark.parametrize("soc", SOCS)
def test_devices(python_on, soc):
    code = """
        import torch, mindiesd
        from mindiesd.utils.get_platform import get_npu_device
        torch.npu.set_device(1)
        print(torch.npu.device_count(), torch.accelerator.device_count(), torch.npu.current_device(),
              torch.npu.get_device_name(1), get_npu_device().name)
    """
    assert python_on(soc, code, devices=2) == f"2 2 1 {soc} {SOCS[soc]}"


def test_tensors_go_there_and_back(python_on):
    code = """
        import torch
        x = torch.arange(24.0).reshape(2, 3, 4).bfloat16()
        there = x.to("npu:1")
        torch.npu.synchronize(1)
        assert str(there.device) == "npu:1" and torch.npu.memory_allocated(1) > 0
        assert torch.equal(there.cpu(), x) and torch.equal(there.to("npu:0")[1].cpu(), x[1])
        print("equal")
    """
    assert python_on("Ascend910B4", code, devices=2) == "equal"


def test_nothing_computes(python_on):
    """So that no test can take a stub's answer for a number."""
    code = """
        import torch
        x = torch.ones(4).to("npu")
        try:
            print((x + 1).cpu())
        except RuntimeError as error:
            print("failed:", "stub of CANN" in str(error))
    """
    assert python_on("Ascend910B4", code) == "failed: True"


def test_without_devices(python_on):
    code = "import torch; print(torch.npu.device_count(), torch.npu.is_available())"
    assert python_on("Ascend910B4", code, devices=0) == "0 False"


def test_this_process_has_the_wheels():
    import mindiesd  # noqa: F401, PLC0415

    assert torch.npu.device_count() == 1
    assert torch.ops.npu.npu_fusion_attention.default._schema and torch.ops.mindiesd.la.default._schema
