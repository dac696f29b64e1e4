"""Files of somebody who means harm are refused by name, soon and in little memory, and nothing of them runs."""

import json
import os
import random
import subprocess
import sys

import hostile_files
import pytest

SECONDS, MEMORY = 5, 10**9  # of CPU time, and bytes added
SAMPLE = 20  # cases in a run without --all-hostile-files


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """Of each case that is run, by name: see hostile_files.py."""
    seed = int.from_bytes(os.urandom(4), "little")
    names = sorted(hostile_files.CASES)
    if not request.config.getoption("--all-hostile-files"):
        names = random.Random(seed).sample(names, SAMPLE)
    print(f"seed {seed}")
    command = [sys.executable, hostile_files.__file__, str(tmp_path_factory.mktemp("hostile")), *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *hostile_files.SOUND_CASES], env=environment, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_is_refused_by_name_soon_and_in_little_memory(outcomes):
    hostile = {name: outcome for name, outcome in outcomes.items() if name in hostile_files.CASES}
    print(f"{len(hostile)} cases, most CPU time {max(outcome['seconds'] for outcome in hostile.values()):.1f} s, "
          f"most memory {max(outcome['memory'] for outcome in hostile.values()) / 1e6:.0f} MB")  # fmt: skip
    wrong = {name: faults for name, outcome in hostile.items() if (faults := list(faults_of(name, outcome)))}
    assert not wrong, json.dumps(wrong, indent=1)


def faults_of(name, outcome):
    said = outcome["said"]
    if outcome["status"] != 1 or "Traceback" in said:
        yield f"ended with {outcome['status']}: {said[-1500:]}"
    if f"/{name}/" not in said and f"{name} " not in said:
        yield f"does not name the file: {said[:500]}"
    if any(not one.isprintable() for one in said.replace("\n", "")) or len(said) > 6000:
        yield f"prints {said[:500]!r}"
    if outcome.get("seconds", SECONDS) >= SECONDS or outcome.get("memory", MEMORY) >= MEMORY:
        yield f"took {outcome.get('seconds')} s and {outcome.get('memory')} bytes"
    if outcome["appeared"]:
        yield f"made {outcome['appeared']}"


def test_what_only_looks_odd_is_read(outcomes):
    for name in hostile_files.SOUND_CASES:
        outcome = outcomes[name]
        assert outcome["status"] == 0, f"{name}: {outcome['said']}"
        assert outcome["appeared"] == outcome["target"], f"{name} made {outcome['appeared']}"


def test_all_that_is_made_of_a_cache_are_files(outcomes):
    """Not its links."""
    assert "vae/latent_rgb.json" in " ".join(outcomes["in_the_cache"]["target"])
