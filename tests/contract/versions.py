"""What the installed torch_npu lacks. Older ones than requirements-contract.txt names are tested by hand, one at a time:
scripts/test.sh --torch-npu VERSION."""

import torch_npu

KNOWS_950 = hasattr(torch_npu, "float8_e8m0fnu")  # the cards of the 950 series; unknown to those for CANN 8.5
OF_950 = {"npu::npu_dynamic_mx_quant", "npu::npu_fused_infer_attention_score_v2"}  # whose schemas differ or are absent
