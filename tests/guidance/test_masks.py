"""Masks of the comparison: what each covers, what it belongs to, and how it guides."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.diffusion.noise import Samples
from guided_diffusion.guidance.base import GuidedDenoiser, Observation, Step
from guided_diffusion.guidance.masked_blur import MaskGuidance
from guided_diffusion.guidance.masks import CentredSquare, GivenMaps, HighFrequency, RandomCells, everywhere, top_share
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.networks.attention import find_block
from guided_diffusion.runs.identity import settings_hash
from guided_diffusion.script_util import create_guidance, create_model_and_diffusion
from running import refused, run
from small import SMALL, randomised

SIDE = 16
X = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
T = torch.full((2,), 4)
MAPS = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(8))
WITH_SHARE = [HighFrequency, RandomCells, CentredSquare, lambda share: GivenMaps(maps=MAPS, share=share)]


def step_of(diffusion, network, indices=(0, 1), t=4, x=X):
    denoiser = diffusion.denoiser(network)
    return Step(denoiser, x, torch.full((len(x),), t), {}, samples=Samples(5, list(indices)))


def guide(small, guidance):
    network, diffusion = small
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [guidance], Samples(5, [0, 1]))
    return guided(X, T, {}), guided


def masked(masking, **settings):
    return MaskGuidance(**{"scale": 0.7, "masking": masking, "blur_sigma": 2.0} | settings)


@pytest.mark.parametrize("make", WITH_SHARE)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.77, 1.0])
def test_the_share_is_the_one_that_was_asked_for(small, make, share):
    network, diffusion = small
    step = step_of(diffusion, network)
    mask = masked(make(share)).mask(step)
    assert mask.shape == (2, 1, SIDE, SIDE)
    assert mask.dtype is torch.bool
    cells = 64 if isinstance(make(share), GivenMaps) else SIDE**2
    assert (mask.flatten(1).float().mean(dim=1) - share).abs().max() <= 0.5 / cells + 1e-6


def test_an_observation_is_all_that_a_mask_needs(small):
    sag = SelfAttentionGuidance(scale=1.0, block=find_block(small[0], "output_blocks.2.1"))
    for guidance in [sag, *(masked(make(0.4)) for make in WITH_SHARE), masked(everywhere)]:
        _, guided = guide(small, guidance)
        step = guided.last_step
        seen = Observation(step.base, step.recorded, step.samples)
        assert torch.equal(guidance.mask(seen), guidance.mask(step))


def test_without_known_samples_rows_are_places(small):
    network, diffusion = small
    base = diffusion.denoiser(network)(X, T, {})
    assert list(Observation(base, {}).indices) == [0, 1]
    assert list(Observation(base, {}, Samples(5, [7, 9])).indices) == [7, 9]


def test_random_cells_are_whole(small):
    network, diffusion = small
    mask = masked(RandomCells(0.4, cells=4)).mask(step_of(diffusion, network))
    cells = mask.reshape(2, 4, 4, 4, 4).transpose(2, 3).flatten(3).float().mean(dim=3)
    assert set(cells.flatten().tolist()) == {0.0, 1.0}
    assert cells.sum(dim=(1, 2)).tolist() == [6, 6]


def test_random_masks_belong_to_sample_and_step(small):
    network, diffusion = small
    masking = RandomCells()
    together = masking(step_of(diffusion, network, [7, 9]))
    alone = masking(step_of(diffusion, network, [9], x=X[:1]))
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, masking(step_of(diffusion, network, [7, 9], t=3)))
    assert torch.equal(together, masking(step_of(diffusion, network, [7, 9])))


def test_random_masks_without_known_samples_come_from_torch(small):
    network, diffusion = small
    step = Step(diffusion.denoiser(network), X, T, {})
    torch.manual_seed(1)
    first, second = RandomCells()(step), RandomCells()(step)
    torch.manual_seed(1)
    assert torch.equal(RandomCells()(step), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 15), (9, 20)])
def test_the_square_is_in_the_middle(height, width):
    class Base:
        x_t = torch.zeros(1, 3, height, width)

    class AStep:
        base = Base

    side = 5 if height % 2 else 6
    [[mask]] = CentredSquare(share=side**2 / (height * width))(AStep)
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    if width % 2 == height % 2:
        assert mask.sum() == side**2 == len(rows) * len(columns)
        assert rows.tolist() == [height - 1 - row for row in reversed(rows.tolist())]
        assert columns.tolist() == [width - 1 - column for column in reversed(columns.tolist())]
    assert mask.sum() == side**2


def test_the_high_frequency_mask_finds_the_detail():
    class Base:
        x_t = torch.zeros(1, 3, 32, 32)
        x0 = torch.linspace(-1, 1, 32).sin()[:, None].expand(1, 3, 32, 32).clone()

    class AStep:
        base = Base

    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    Base.x0[..., 4:12, 20:28] += 0.4 * checks
    mask = HighFrequency(share=64 / 1024)(AStep)
    assert mask[..., 4:12, 20:28].float().mean() > 0.9


def test_maps_belong_to_samples(small):
    network, diffusion = small
    mask = GivenMaps(maps=MAPS, share=0.25)(step_of(diffusion, network, [4, 2]))
    assert torch.equal(mask, top_share(MAPS[[1, 2]], 0.25))
    taken = MAPS > 0.9
    assert torch.equal(GivenMaps(maps=taken)(step_of(diffusion, network, [4, 2]))[:, 0], taken[[1, 2]])


def test_a_mask_of_ones_is_blur_guidance(small):
    block = find_block(small[0], "middle_block.1")
    by_attention = SelfAttentionGuidance(scale=0.7, block=block, threshold=-1.0, blur_sigma=2.0)
    reference, _ = guide(small, by_attention)
    for masking in (everywhere, RandomCells(1.0), lambda step: torch.ones(2, 1, 4, 4, dtype=torch.bool)):
        assert torch.equal(guide(small, masked(masking))[0].eps, reference.eps)


@pytest.mark.parametrize("make", WITH_SHARE)
def test_an_empty_mask_is_no_guidance(small, make):
    network, diffusion = small
    prediction, guided = guide(small, masked(make(0.0)))
    assert torch.equal(prediction.eps, diffusion.denoiser(network)(X, T, {}).eps)
    assert guided.evaluations == 2
    assert not torch.equal(guide(small, masked(make(0.5)))[0].eps, prediction.eps)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_an_impossible_share_is_refused(share):
    for make in WITH_SHARE:
        with pytest.raises(ValueError, match="sag_mask_share: wanted 0 to 1"):
            make(share)


def test_the_flag_makes_the_mask(small, tmp_path):
    np.savez(tmp_path / "maps.npz", maps=MAPS.numpy())
    wanted = {"global": everywhere, "high-frequency": HighFrequency, "random": RandomCells, "square": CentredSquare}
    for name, kind in wanted.items():
        masking = create_guidance(small[0], sag_scale=1, sag_mask=name).masking
        assert masking is kind or type(masking) is kind
    given = create_guidance(small[0], sag_scale=1, sag_mask=str(tmp_path / "maps.npz"), sag_mask_share=0.2)
    assert torch.equal(given.masking.maps, MAPS)
    assert given.masking.share == 0.2


@pytest.mark.parametrize(
    ("kind", "read"), [(np.float64, torch.float32), (np.float16, torch.float32), (bool, torch.bool)]
)
def test_maps_of_any_floats_are_read(small, tmp_path, kind, read):
    values = (MAPS.numpy() > 0.5).astype(kind)
    np.savez(tmp_path / "maps.npz", maps=values)
    maps = create_guidance(small[0], sag_scale=1, sag_mask=str(tmp_path / "maps.npz")).masking.maps
    assert torch.equal(maps, torch.from_numpy(values).to(read))


NETWORK = SMALL | {"timestep_respacing": 3, "num_samples": 4, "batch_size": 2}
NETWORK |= {"sag_scale": 0.5, "sag_block": "middle_block.1"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(randomised(create_model_and_diffusion(**SMALL)[0]).state_dict(), folder / "network.pt")
    np.savez(folder / "maps.npz", maps=MAPS.numpy())
    return NETWORK | {"model_path": folder / "network.pt"}


def images(folder):
    with np.load(folder / "samples_4x16x16x3.npz") as file:
        return file["arr_0"].astype(int)


@pytest.mark.parametrize("mask", ["random", "maps.npz"])
def test_samples_do_not_depend_on_the_batch(flags, tmp_path, mask):
    mask = flags["model_path"].parent / mask if mask.endswith(".npz") else mask
    for size in (1, 3):
        run("image_sample", **flags | {"batch_size": size, "out_dir": tmp_path / str(size)}, sag_mask=mask)
    assert np.abs(images(tmp_path / "1") - images(tmp_path / "3")).max() <= 1


def test_maps_of_other_contents_are_other_settings(flags, tmp_path, capsys):
    maps = tmp_path / "maps.npz"
    np.savez(maps, maps=MAPS.numpy())
    run("image_sample", **flags, out_dir=tmp_path / "out", sag_mask=maps)
    first = images(tmp_path / "out")
    run("image_sample", config=tmp_path / "out" / "config.yaml", out_dir=tmp_path / "again")
    assert np.array_equal(first, images(tmp_path / "again"))
    np.savez(maps, maps=1 - MAPS.numpy())
    capsys.readouterr()
    assert "sag_mask was" in refused(capsys, "image_sample", **flags, out_dir=tmp_path / "out", sag_mask=maps)


def test_a_folder_older_than_a_flag_goes_on_where_the_flag_is_at_its_default(flags, tmp_path, capsys):
    import json

    out_dir = tmp_path / "out"
    run("image_sample", **flags, out_dir=out_dir)
    manifest = json.loads((out_dir / "manifest.json").read_text())
    assert not {"sag_mask", "sag_mask_share"} & set(manifest["identity"])
    assert {"sag_mask", "sag_mask_share", "sag_scale"} <= set(manifest["settings"])
    assert manifest["hash"] == settings_hash(manifest["identity"])
    capsys.readouterr()
    assert "sag_mask was the default, is 'square'" in refused(
        capsys, "image_sample", **flags, out_dir=out_dir, sag_mask="square"
    )
    run("image_sample", **flags, out_dir=out_dir, sag_mask="self-attention")
    assert "(4 were there)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"sag_mask": "round"},
            "wanted self-attention, global, high-frequency, random, square or a FILE.npz, got 'round'",
        ),
        ({"sag_mask": "nowhere.npz"}, "sag_mask: no such file"),
        ({"sag_mask": "random", "sag_mask_share": 2}, "sag_mask_share: wanted 0 to 1, got 2.0"),
        ({"sag_mask_share": 0.3}, "sag_mask_share: the mask self-attention has no share"),
        ({"sag_mask": "square", "fidelity": "reference"}, "fidelity: reference has the self-attention mask only"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, tmp_path, capsys, wrong, said):
    assert said in refused(capsys, "image_sample", **flags | wrong, out_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mask": np.zeros((1, 8, 8), np.float32)}, "wanted one array maps"),
        ({"maps": np.zeros((8, 8), np.float32)}, "or bool [N, N, N], got float32 [8, 8]"),
        ({"maps": np.zeros((1, 8, 8), np.int32)}, "wanted float32 or float64 or float16 or bool [N, N, N], got int32"),
        ({"maps": np.full((1, 8, 8), 1e300)}, "not finite"),
        ({"maps": np.zeros((0, 8, 8), np.float32)}, "wanted [maps, height, width], got [0, 8, 8]"),
        ({"maps": np.full((1, 8, 8), np.nan, np.float32)}, "not finite"),
        ({"maps": np.array([{}])}, "got object"),
    ],
)
def test_a_wrong_file_of_maps_is_one_sentence(flags, tmp_path, capsys, arrays, said):
    np.savez(tmp_path / "bad.npz", **arrays)
    error = refused(capsys, "image_sample", **flags, out_dir=tmp_path / "out", sag_mask=tmp_path / "bad.npz")
    assert said in error
    assert str(tmp_path / "bad.npz") in error
