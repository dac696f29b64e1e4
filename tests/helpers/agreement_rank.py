"""A rank that has read other settings of a model than the others (see tests/ranks/test_own_defaults.py)."""

from types import SimpleNamespace

import pytest
from ascend_runtime import SampleSpec
from ascend_runtime.engine.pipeline import _require_agreement
from gloo_ranks import join


def main():
    _, rank, _ = join()
    own = {"steps": 20 + rank, "boundary": 0.8 + rank / 10, "static_steps": (0, 5 + rank)}
    for name in (None, *own):
        read = {"steps": 20, "boundary": 0.8, "static_steps": None} | ({} if name is None else {name: own[name]})
        model = SimpleNamespace(boundary=read["boundary"], defaults=SimpleNamespace(static_steps=read["static_steps"]))
        if name is None:
            _require_agreement(SampleSpec(steps=read["steps"]), model)
            continue
        with pytest.raises(ValueError, match="changed while ranks read them. Try again."):
            _require_agreement(SampleSpec(steps=read["steps"]), model)
