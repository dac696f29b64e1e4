"""A VAE in tiles over several ranks makes what diffusers makes of the whole, and sends borders alone."""

import json
import math
from collections import Counter
from itertools import product

import gloo_ranks
import pytest
import tile_rank
import tiny_models
import torch
from ascend_runtime.models.wan.vae import streamed as wan_vae
from ascend_runtime.parallel.tiles import TileGrid, Tile, grid_of
from ascend_runtime.models.shared.tiling import margin
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from safetensors.torch import save_file

VAES = {"2.1": (tiny_models.wan_vae, 16, 8), "2.2": (tiny_models.wan22_vae, 48, 16)}  # maker, channels, pixels
RANKS, SAMPLE = [1, 2, 3, 4, 5, 6, 7, 8, 16], [1, 3]
LARGE, ODD, FEW = (34, 58), (9, 13), (2, 3)  # a latent's; the last has fewer pixels than there are ranks
LATENT_FRAMES = [1, 2, 5]  # 1, 5 and 17 frames of a video
GRIDS = [([5, 4], [13]), ([9], [7, 6]), ([5, 4], [5, 5, 3]), ([4, 3, 2], [7, 6])]


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """The folder of both, and the networks."""
    folder = tmp_path_factory.mktemp("vaes")
    made = {name: tiny_models.randomise(make(seed=1), 3) for name, (make, _, _) in VAES.items()}
    for name, vae in made.items():
        vae.save_pretrained(folder / name)
    return folder, made


def pytest_generate_tests(metafunc):
    if "ranks" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-tiles")
        metafunc.parametrize("ranks", RANKS if every else SAMPLE)


def case(vae, work, size, frames, grid=None):
    """What a rank is told, and the input: a latent or a video."""
    _, channels, pixels = VAES[vae]
    latent, video = (1, channels, frames, *size), (4 * frames - 3, *(pixels * side for side in size), 3)
    generator = torch.Generator().manual_seed(frames)
    given = torch.randn(latent, generator=generator) if work == "decode" else torch.rand(video, generator=generator)
    return {"vae": vae, "work": work, "shape": video if work == "decode" else latent, "grid": grid}, given


def on_ranks(vaes, folder, ranks, cases):
    """The results of (case, input) pairs, and what each rank sent."""
    source, _ = vaes
    for name in VAES:
        (folder / name).symlink_to(source / name)
    (folder / "cases.json").write_text(json.dumps([told for told, _ in cases]))
    save_file({str(number): given for number, (_, given) in enumerate(cases)}, folder / "inputs.safetensors")
    for number, (told, _) in enumerate(cases):
        tile_rank.shared(folder, number, told["shape"]).fill_(torch.nan)
    gloo_ranks.run("tile_rank.py", folder, ranks, timeout=600)
    results = [tile_rank.shared(folder, number, told["shape"]) for number, (told, _) in enumerate(cases)]
    return results, [json.loads((folder / f"sent-{rank}.json").read_text()) for rank in range(ranks)]


@torch.no_grad()
def by_diffusers(vae, work, given):
    if work == "decode":
        return vae.decode(given).sample[0].permute(1, 2, 3, 0) / 2 + 0.5
    return vae.encode(given.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()


@pytest.fixture(scope="module")
def expected(vaes):
    """`expected(told, given)`, computed once for each."""
    kept = {}

    def result(told, given):
        key = (told["vae"], told["work"], given.shape)
        if key not in kept:
            kept[key] = by_diffusers(vaes[1][told["vae"]], told["work"], given)
        return kept[key]

    return result


def test_tiles_equal_diffusers(request, vaes, tmp_path, expected, ranks):
    every = request.config.getoption("--all-tiles")
    sizes = product([LARGE, ODD, FEW], LATENT_FRAMES) if every else [(ODD, 5), (FEW, 2), (ODD, 1)]
    cases = [case(vae, work, *size) for vae, work, size in product(VAES, ("decode", "encode"), sizes)]
    results, _ = on_ranks(vaes, tmp_path, ranks, cases)
    for (told, given), result in zip(cases, results):
        wanted = expected(told, given)
        error = (result - wanted).abs().max().item()
        print(f"{ranks} ranks, Wan {told['vae']} {told['work']} of {list(given.shape)}: {error:.1e}")
        assert wanted.std() > 0.05 and error < 1e-4, told


def test_ranks_send_borders_and_nothing_else(request, vaes, tmp_path, expected):
    """To the byte, in whatever grid; what is computed is the same in all of them."""
    told = list(product(VAES, ("decode", "encode"), GRIDS))
    if not request.config.getoption("--all-tiles"):  # each work in two of the grids, and each grid in two works
        told = [one for number, one in enumerate(told) if number % 2 == (number // len(GRIDS)) % 2]
    cases = [case(vae, work, ODD, 2, grid) for vae, work, grid in told]
    results, sent = on_ranks(vaes, tmp_path, max(len(heights) * len(widths) for heights, widths in GRIDS), cases)
    connected = {1}  # the numbers of tiles whose ranks form a group already; one tile needs none
    for number, ((told, given), result) in enumerate(zip(cases, results)):
        assert (result - expected(told, given)).abs().max() < 1e-4, told
        reads = looked_at(vaes[1][told["vae"]], told["work"], given)
        grid = TileGrid(*map(tuple, told["grid"]))
        for rank in range(len(sent)):
            noted = Counter()
            for operation, sent_bytes in sent[rank][number]:
                noted[operation] += sent_bytes
            tile = Tile(grid, rank) if rank < grid.tiles else None
            borders, tokens = (sum(count(tile, *read) for read in reads) for count in (border_bytes, token_bytes))
            print(f"Wan {told['vae']} {told['work']} {told['grid']} rank {rank}: {borders} and {tokens} bytes")
            assert (noted["send"], noted["_allgather_base_"]) == (borders, tokens), told
            assert set(noted) <= {"send", "recv_", "_allgather_base_", "allreduce_"}
            agreed = [operation for operation, _ in sent[rank][number]].count("allreduce_")
            connects = grid.tiles not in connected and tile is not None
            assert agreed == 3 + connects, "on the memory, on the host's or the input, on the result: not on each frame"
        connected.add(grid.tiles)


def looked_at(vae, work, given):
    """(channels x frames, height and width, edges) of each thing that diffusers' VAE looks at beyond a pixel; the edges
    are None where it attends to all pixels."""
    reads, hooks = [], []

    def note(module, arguments):
        x = arguments[0]
        shape, elements = tuple(x.shape[-2:]), x[..., 0, 0].numel()
        if isinstance(module, WanAttentionBlock):
            reads.append((elements, shape, None))
        elif isinstance(module, torch.nn.ZeroPad2d):
            reads.append((elements, shape, module.padding))
        elif module.kernel_size[-1] == 3 and module.stride[-1] == 1:
            reads.append((elements, shape, (1, 1, 1, 1)))

    for module in vae.modules():
        if isinstance(module, (WanAttentionBlock, torch.nn.ZeroPad2d, torch.nn.Conv2d, WanCausalConv3d)):
            hooks.append(module.register_forward_pre_hook(note))
    by_diffusers(vae, work, given)
    for hook in hooks:
        hook.remove()
    return reads


def border_bytes(tile, elements, size, edges):
    """What Tile.fill_edges says; where the plane is not cut, a convolution pads by itself."""
    if tile is None or edges is None:
        return 0
    (left, right, top, bottom), scale = edges, size[0] // sum(tile.grid.heights)
    if edges == (1, 1, 1, 1):
        top = bottom = int(len(tile.grid.heights) > 1)
        left = right = int(len(tile.grid.widths) > 1)
    rows, columns = tile.place(scale)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    pixels = width * (bottom * (rows.start > 0) + top * (rows.stop < size[0]))
    pixels += (top + height + bottom) * (right * (columns.start > 0) + left * (columns.stop < size[1]))
    return 4 * elements * pixels


def token_bytes(tile, elements, size, edges):
    """What Tile.gather says: of keys and values."""
    if tile is None or edges is not None:
        return 0
    scale = (size[0] // sum(tile.grid.heights)) ** 2
    return 4 * 2 * elements * scale * tile.grid.largest * (tile.grid.tiles - 1)


def test_several_ranks_refuse_what_does_not_fit_on_one(vaes, tmp_path):
    """All in the same words, whose figures are right; none of them tiles more finely by itself."""
    size, ranks = (128, 192), 2
    cases, needs = [], []
    for work in ("decode", "encode"):
        told, given = case("2.1", work, size, 1)
        vae = vaes[1]["2.1"]
        needs.append(margin(vae.device) * wan_vae.bytes_needed(vae, work, size[0], size[1] // ranks))
        cases.append((told | {"room": [int(10 * needs[-1]), math.ceil(needs[-1] / 4)]}, given))
    on_ranks(vaes, tmp_path, ranks, cases)
    said = [json.loads((tmp_path / f"refused-{rank}.json").read_text()) for rank in range(ranks)]
    assert said[0] == said[1] and len(said[0]) == len(cases)
    for text, needed, (told, _) in zip(said[0], needs, cases):
        says = [f"AV-1206: To {told['work']} 1536 x 1024 pixels takes {needed / 1e9:.1f} GB on each of 2 ranks",
                f"{needed / 4e9:.1f} GB are free", "about 768 x 512 pixels. Ascend Free Memory"]  # fmt: skip
        assert needed > 1e8 and not [words for words in says if words not in text], text


@pytest.mark.parametrize("tiles, size, wanted", [
    (1, (90, 160), (1, 1)), (2, (60, 104), (1, 2)), (8, (90, 160), (2, 4)), (7, (90, 160), (1, 7)), (5, (3, 1), (3, 1)),
    (16, (90, 160), (2, 8)), (13, (5, 5), (2, 5)), (4, (1, 1), (1, 1)),
])  # fmt: skip
def test_grids(tiles, size, wanted):
    grid = grid_of(tiles, *size)
    assert (len(grid.heights), len(grid.widths)) == wanted
    assert (sum(grid.heights), sum(grid.widths)) == size
    places = [Tile(grid, index).place() for index in range(grid.tiles)]
    covered = torch.zeros(size)
    for rows, columns in places:
        covered[rows, columns] += 1
    assert (covered == 1).all()


def test_borders_are_repeated_and_norms_are_of_the_whole_plane(tmp_path):
    """For VAEs which have these (plane_rank.py says what is compared): 4 tiles, in rows, in columns and in both."""
    gloo_ranks.run("plane_rank.py", tmp_path, 4)
    for rank in range(4):
        errors = json.loads((tmp_path / f"errors-{rank}.json").read_text())
        assert len(errors) == 8 and max(errors.values()) < 2e-5, errors
