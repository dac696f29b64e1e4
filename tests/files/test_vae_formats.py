"""A VAE as the original and ComfyUI keep it: told by content, and equal to diffusers' network."""

import original_formats as formats
import pytest
import torch
from ascend_runtime import VaeSpec
from ascend_runtime.recognition.layout import find_vae, vae_form
from ascend_runtime.components import Components
from ascend_runtime.models.wan.vae import streamed as wan_vae
from ascend_runtime.parallel.tiles import single_tile
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from tiny_models import randomise

VAES = {
    "Wan 2.1": {"base_dim": 4},
    "Wan 2.2": {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "in_channels": 12,
                "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
}  # fmt: skip


@pytest.fixture(scope="module", params=VAES)
def theirs(request):
    return randomise(AutoencoderKLWan(**VAES[request.param]), seed=4).eval()



WRITERS = {".pth": lambda path, tensors: torch.save(tensors, path), ".safetensors": lambda path, x: save_file(x, path)}


def load(path):
    return Components(torch.device("cpu")).get(VaeSpec(path=str(path)), lambda *_: None)


@torch.no_grad()
@pytest.mark.parametrize("suffix", WRITERS)
def test_equals_diffusers(tmp_path, theirs, suffix):
    WRITERS[suffix](tmp_path / "named as it likes", formats.original_vae(theirs))
    ours = load(tmp_path / "named as it likes")
    generator = torch.Generator().manual_seed(1)
    pixels = 2 * theirs.config.scale_factor_spatial
    latent = torch.randn(theirs.config.z_dim, 2, 2, 2, generator=generator)
    video = torch.randn(3, 5, pixels, pixels, generator=generator).clamp(-1, 1)
    decoded = torch.cat([*wan_vae.decoded(ours.network, latent.unbind(1), single_tile(2, 2))], dim=1)
    encoded = torch.stack([*wan_vae.encoded(ours.network, [video[:, :1], video[:, 1:]], single_tile(2, 2))], dim=1)
    for made, expected in ((decoded, theirs.decode(latent[None]).sample[0]),
                           (encoded, theirs.encode(video[None]).latent_dist.mean[0])):  # fmt: skip
        print(f"\n{theirs.config.z_dim} channels{suffix:15} largest difference {(made - expected).abs().max():.1e}")
        assert expected.std() > 0.01
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_the_config_is_the_published_one(tmp_path, theirs):
    torch.save(formats.original_vae(theirs), tmp_path / "vae")
    config = AutoencoderKLWan.from_config(find_vae(str(tmp_path / "vae")).config).config
    if theirs.config.z_dim == 48:  # the last of Wan-AI/Wan2.2-TI2V-5B-Diffusers' vae/config.json
        assert config.latents_mean[-1] == -0.0667 and config.latents_std[-1] == 0.7744
        assert len(config.latents_mean) == len(config.latents_std) == 48
    for key, value in theirs.config.items():
        if not key.startswith(("_", "latents")) and key != "decoder_base_dim":
            assert config[key] == value, key
    assert config.decoder_base_dim == (theirs.config.decoder_base_dim or theirs.config.base_dim)
    spatial = theirs.config.scale_factor_spatial
    form = vae_form(str(tmp_path / "vae"))
    assert form.decoded_shape((1, theirs.config.z_dim, 3, 2, 4)) == (9, 2 * spatial, 4 * spatial, 3)


def test_our_names_of_the_original_are_those_that_diffusers_converts():
    """The test's own table, against diffusers' for Wan 2.1."""
    vae = AutoencoderKLWan(base_dim=4)
    assert set(convert_wan_vae_to_diffusers(formats.original_vae(vae))) == set(vae.state_dict())


def test_the_one_of_the_originals_folder(tmp_path, theirs):
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    torch.save({"token_embedding.weight": torch.zeros(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no Wan VAE. Download Wan2.1_VAE.pth of Wan-AI"):
        load(tmp_path)
    torch.save(formats.original_vae(theirs), tmp_path / "b.pth")
    before = find_vae(str(tmp_path)).fingerprint
    assert load(tmp_path).network.config.z_dim == theirs.config.z_dim
    torch.save(formats.original_vae(theirs), tmp_path / "b.pth")
    assert find_vae(str(tmp_path)).fingerprint != before


NAME, OURS = "decoder.middle.0.residual.2.weight", "decoder.mid_block.resnets.0.conv1.weight"
DAMAGE = {
    f"missing: {OURS}": lambda t: {name: x for name, x in t.items() if name != NAME},
    "unexpected: stranger": lambda t: t | {"stranger": torch.zeros(1)},
    f"of the wrong shape: {OURS}": lambda t: t | {NAME: torch.zeros(2, 3)},
    f"NaN or infinite values in {OURS}": lambda t: t | {NAME: torch.full_like(t[NAME], float("nan"))},
    "is not a Wan VAE": lambda t: {"patch_embedding.weight": torch.zeros(2)},
    "lacks decoder.conv_out.weight": lambda t: {name: x for name, x in t.items() if name != "decoder.head.2.weight"},
}


@pytest.mark.parametrize("says", DAMAGE)
def test_damage_is_named(tmp_path, theirs, says):
    torch.save(DAMAGE[says](formats.original_vae(theirs)), tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "vae.pth")
