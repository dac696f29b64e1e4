"""Digests of model files: of the content, in every format that the loaders read, whatever the paths."""

import random
import shutil

import original_formats as formats
import pytest
import random_wan
from ascend_runtime.checkpoints import digest
from ascend_runtime.checkpoints.digest import digests_of, file_digest, joint_digest
from ascend_runtime.recognition.layout import find_transformer
from safetensors.torch import load_file, save_file

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return load_file(random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", seed=11, layers=3))


def digest_of(path) -> str:
    """Of a transformer."""
    return joint_digest(digests_of(find_transformer(str(path)).files))


def flipped(file, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("form", formats.WRITERS)
def test_a_copy_is_equal_and_a_changed_sample_is_not(tmp_path, tensors, form):
    formats.WRITERS[form](tmp_path / "one", tensors)
    whole = digest_of(tmp_path / "one")
    copy = shutil.copytree if (tmp_path / "one").is_dir() else shutil.copy
    copy(tmp_path / "one", tmp_path / "another name")
    assert digest_of(tmp_path / "another name") == whole
    largest = max(find_transformer(str(tmp_path / "another name")).files, key=lambda file: file.stat().st_size)
    flipped(largest, list(digest._ranges(largest.stat().st_size, 0))[digest.SAMPLES // 2][0])
    assert digest_of(tmp_path / "another name") != whole


def test_formats_of_the_same_weights_are_different_files(tmp_path, tensors):
    for form, write in formats.WRITERS.items():
        write(tmp_path / form.replace("/", " "), tensors)
    assert len({digest_of(path) for path in tmp_path.iterdir()}) == len(formats.WRITERS)


def test_the_names_of_shards_do_not_matter(tmp_path, tensors):
    names = [*tensors]
    halves = [{name: tensors[name] for name in names[start::2]} for start in (0, 1)]
    for folder, order in (("one", (0, 1)), ("other", (1, 0))):
        (tmp_path / folder).mkdir()
        for number, half in enumerate(order):
            save_file(halves[half], tmp_path / folder / f"wan-0000{number + 1}-of-00002.safetensors")
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "other")


def test_a_name_and_a_dtype_in_the_header_count(tmp_path, tensors):
    name = next(iter(tensors))
    changed = [tensors, {**tensors, name: tensors[name].view(tensors[name].dtype).flip(0)},
               {f"{key}x" if key == name else key: tensor for key, tensor in tensors.items()}]  # fmt: skip
    for number, held in enumerate(changed):
        save_file(held, tmp_path / f"{number}.safetensors")
    assert len({file_digest(file) for file in tmp_path.iterdir()}) == len(changed)


def test_any_sampled_byte_of_a_large_file_counts(tmp_path, rng):
    """A file with holes, of which a digest reads 5 MiB."""
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(28 * GIGABYTE)
    whole, seen = file_digest(file), set()
    ranges = list(digest._ranges(28 * GIGABYTE, 0))
    assert sum(end - start for start, end in ranges) <= digest.FIRST_BYTES + digest.SAMPLES * digest.SAMPLE
    for start, end in [ranges[0], ranges[-1], *rng.sample(ranges, 4)]:
        place = rng.randrange(start, end)
        flipped(file, place)
        seen.add(file_digest(file).digest)
        flipped(file, place)
    assert whole.digest not in seen and len(seen) > 1
    assert file_digest(file) == whole and whole.size == 28 * GIGABYTE


@pytest.mark.parametrize(
    "size", [0, 1, digest.SAMPLE, digest.FIRST_BYTES, digest.FIRST_BYTES + 1, 5 * 2**20, 5 * 2**20 + 3]
)
def test_ranges_lie_in_the_file_in_order(size):
    at = 0
    for start, end in digest._ranges(size, 0):
        assert at <= start <= end <= size
        at = end
    assert at == size


def test_a_small_file_is_read_whole(tmp_path):
    file = tmp_path / "small"
    file.write_bytes(random.Random(3).randbytes(2 * 2**20))
    seen = {file_digest(file)}
    for place in (0, 2**20 - 1, 2**20, 2**20 + 7, 2 * 2**20 - 1):
        flipped(file, place)
        seen.add(file_digest(file))
    assert len(seen) == 6
