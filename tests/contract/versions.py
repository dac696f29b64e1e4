"""What the installed torch_npu lacks. Those other than the one of requirements-contract.txt are tested by hand:
scripts/test.sh --torch-npu VERSION."""

import torch_npu

KNOWS_950 = hasattr(torch_npu, "float8_e8m0fnu")  # the cards of the 950 series; those for CANN 8.5 do not
# Parameters that those for CANN 8.5 lack in operators that they have, with the value that is meant there.
LATER = {} if KNOWS_950 else {
    "quant_mode": "pertoken", "scale_dtype": None, "pertoken_scale_dtype": None, "input_dtype": None, "out_dtype": None,
}  # fmt: skip
