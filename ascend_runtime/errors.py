"""Codes of errors about the host, files, loading, memory and deaths of ranks, by which docs/errors.md is looked up.

An error of an argument needs no code, as its text says what the argument can be.
"""

from __future__ import annotations

import re

# Code -> its title in docs/errors.md, by range.
CODES: dict[str, str] = {
    # 10xx: driver, CANN and packages
    "AV-1001": "The NPU driver is missing",
    "AV-1002": "CANN is not set up",
    "AV-1003": "Versions of packages do not match",
    "AV-1004": "torch_npu does not know this card",
    "AV-1005": "torch_npu does not know an allocator option",
    "AV-1006": "torch_npu is not installed",
    "AV-1007": "A container lacks device files",
    "AV-1008": "A card cannot run these models",
    "AV-1009": "A chosen card does not exist",
    "AV-1010": "mindiesd does not fit torch",
    "AV-1011": "A variable hides CANN's packages or libraries",
    "AV-1012": "The driver does not answer",
    "AV-1013": "A card is not healthy",
    "AV-1014": "Python is not supported",
    "AV-1015": "A package is missing, too old or too new",
    "AV-1016": "A package cannot be imported",
    "AV-1017": "torch cannot use the GPUs",
    # 11xx: ports, threads, variables, limits
    "AV-1101": "HCCL cannot use its ports",
    "AV-1102": "No more threads can be started",
    "AV-1103": "A variable has an invalid value",
    "AV-1104": "A network interface is missing or down",
    "AV-1105": "Another program uses a card's memory",
    "AV-1106": "The host has little free memory",
    "AV-1107": "A container has little memory",
    "AV-1108": "The CPU has no bfloat16 instructions",
    "AV-1109": "There are fewer cores than ranks",
    "AV-1110": "Few files may be open",
    "AV-1111": "Ranks are left from before",
    "AV-1112": "The disk is slow",
    "AV-1113": "Ended processes are not removed",
    # 12xx: memory
    "AV-1201": "The card's memory is full",
    "AV-1202": "The host's memory is full",
    "AV-1203": "The experts do not fit into the host's memory",
    "AV-1204": "The original weights of LoRA layers do not fit into the host's memory",
    "AV-1205": "A cache does not fit",
    "AV-1206": "The VAE's work does not fit",
    "AV-1207": "The decoded video does not fit into the host's memory",
    "AV-1208": "Shared memory cannot be allocated",
    "AV-1209": "A file cannot be mapped into memory",
    "AV-1210": "No plan fits",
    # 13xx: files
    "AV-1301": "A file or folder does not exist",
    "AV-1302": "A file is not complete",
    "AV-1303": "A file is a Git LFS pointer",
    "AV-1304": "A file is a web page",
    "AV-1305": "A file's format is not supported",
    "AV-1306": "A file does not hold weights",
    "AV-1307": "Files of a model are missing",
    "AV-1308": "A network is not known",
    "AV-1309": "A description of a model is broken",
    "AV-1310": "Several models or files are possible",
    "AV-1311": "A variant of a model is not supported",
    "AV-1312": "A file holds what no model's file has",
    "AV-1313": "The disk or network share returns errors",
    "AV-1314": "Permissions are missing",
    "AV-1315": "A file changed while it was read",
    "AV-1316": "The disk is full",
    "AV-1317": "Weights have NaN or infinite values",
    "AV-1318": "A link leads out of a model's folder",
    # 14xx: loading
    "AV-1401": "Weights do not fit their network",
    "AV-1402": "A file of another part is given",
    "AV-1403": "The two experts do not belong together",
    "AV-1404": "A LoRA does not fit the model",
    "AV-1405": "A LoRA's format is not supported",
    "AV-1406": "A LoRA cannot be used with quantized weights",
    "AV-1407": "The card does not support the quantization",
    "AV-1408": "Quantized weights do not fit their description",
    "AV-1409": "A tokenizer is missing",
    "AV-1410": "A tokenizer belongs to another model",
    "AV-1411": "A tokenizer's file cannot be used",
    "AV-1412": "The dtype is not supported",
    "AV-1413": "The VAE belongs to another model",
    "AV-1414": "Text encoders are missing or do not belong together",
    "AV-1415": "Quantized weights cannot be divided among these ranks",
    "AV-1416": "A calibration is missing or belongs to another model",
    "AV-1417": "No operator of this card can do it",
    # 15xx: ranks that die or do not answer
    "AV-1501": "A rank was killed by SIGKILL",
    "AV-1502": "A rank was killed by SIGBUS",
    "AV-1503": "A rank crashed",
    "AV-1504": "A rank ended by itself",
    "AV-1505": "Ranks were not ready in time",
    "AV-1506": "Ranks did not answer in time",
    "AV-1507": "A rank sent an invalid message",
    "AV-1508": "A rank waited too long for another one",
    "AV-1509": "Ranks cannot connect to each other",
    "AV-1510": "A rank failed unexpectedly",
    # 16xx: numbers
    "AV-1601": "A step of denoising overflows",
    "AV-1602": "A weight in memory is not finite",
    "AV-1603": "An input is not finite",
    "AV-1604": "An accelerator makes values that are not finite",
    "AV-1605": "A text encoder overflows",
    "AV-1606": "The decoded video is not finite",
    "AV-1607": "The encoded video is not finite",
    "AV-1608": "Frames have one colour",
    "AV-1609": "All frames are the same",
    # 17xx: ComfyUI
    "AV-1701": "ComfyUI is too old",
    "AV-1702": "ComfyUI is not found",
    "AV-1703": "extra_model_paths.yaml cannot be used",
    "AV-1704": "A folder of models cannot be read",
    "AV-1705": "No model files are found",
    # 18xx: downloads
    "AV-1801": "A hub does not answer",
    "AV-1802": "A hub does not have a file",
    "AV-1803": "A hub gives no access to a file",
    "AV-1804": "A file is not the published one",
    "AV-1805": "A hub's answer is not valid",
    # 19xx: more than one machine
    "AV-1901": "A cluster does not exist, or its file cannot be used",
    "AV-1902": "A key file cannot be used",
    "AV-1903": "Versions of the pack differ between machines",
    "AV-1904": "Ranks do not fit the cluster",
    "AV-1905": "Ranks have not joined in time",
    "AV-1906": "A machine was lost",
    "AV-1907": "A file differs between machines",
    "AV-1908": "A cluster's address cannot be used, or is open to strangers",
    "AV-1909": "The keys of client and machine differ",
    "AV-1910": "No client came in time",
    "AV-1911": "A machine's relay cannot start",
    "AV-1912": "A machine does not reach the cluster's network",
}
_FRONT = re.compile(r"\b(AV-\d{4}): ")


def code_of(error: str | BaseException) -> str | None:
    """The code in front of an error's text; None if it has none."""
    front = _FRONT.match(str(error))
    return front and front[1]


def coded(code: str, text: str) -> str:
    """An error's text with its code in front. A text that quotes a coded error gets that error's code, as it is about
    the cause."""
    assert code in CODES, code
    quoted = _FRONT.search(text)
    return f"{quoted[1] if quoted else code}: {without_code(text)}"


def without_code(text: str) -> str:
    """An error's text without codes."""
    return _FRONT.sub("", text)


def coded_error(code: str, text: str) -> ValueError:
    """The error of this text, with its code in front."""
    return ValueError(coded(code, text))


def with_page(text: str) -> str:
    """An error's text with a line that says where its code is explained; as it is if it has none."""
    code = code_of(text)
    return f"{text}\nAscend Video explains {code} in docs/errors.md (中文：docs/errors.zh.md)." if code else text
