"""What a run is known by: its hash stays what it was, unless the samples would be others."""

import numpy as np
import pytest
import torch

from guided_diffusion.runs.identity import identity, made_by, settings_hash
from guided_diffusion.runs.pipeline import tf32
from guided_diffusion.runs.prepare import CLASSIFIER_GROUPS, IMAGE_GROUPS, Configs, image_run
from guided_diffusion.settings.guidance import OtherGuidanceConfig
from guided_diffusion.settings.options import merge, parse_args, resolved
from guided_diffusion.settings.stable_diffusion import StableDiffusionConfig
from guided_diffusion.stable_diffusion.sampling import LatentPipeline
from running import refused, run
from small import EMBEDDED

SETTINGS = {"sag_scale": 0.5, "timestep_respacing": "50", "class_cond": True, "num_classes": 3}
PINNED = "8cc8701beb8f782aba9aac3f420ad9efa581d0959a90374aa60dbf4627c9a399"
PINNED_WITH_CLASSIFIER = "d64482b048ace2f241fd5feba4fedb43f0945f6004b7eaf29bbe8b2f9f5f5f4c"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "any_name.pt"
    path.write_bytes(b"weights")
    return str(path)


def hash_of(configs, version=1):
    return settings_hash(identity(resolved(*configs), version))


@pytest.mark.parametrize(
    ("groups", "pinned"), [(IMAGE_GROUPS, PINNED), (CLASSIFIER_GROUPS, PINNED_WITH_CLASSIFIER)], ids=["image", "class"]
)
def test_the_hash_of_known_settings_is_pinned(weights, groups, pinned):
    # Another hash here gives up every folder that users have: a new setting comes `later`, other samples are a version.
    assert hash_of(merge(groups, ("test", SETTINGS | {"model_path": weights}))) == pinned


@pytest.mark.usefixtures("weights")
def test_how_settings_are_written_does_not_count(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("sag_scale: '0.5'\nnum_classes: '3'\nclass_cond: yes\npaper: none\nmodel_path: any_name.pt\n")
    flags = ["--timestep_respacing", "50", "--class_cond", "true", "--num_samples", "3", "--png", "--out_dir", "there"]
    assert hash_of(parse_args("", IMAGE_GROUPS, ["--config", str(file), *flags])) == PINNED


def test_images_to_begin_with_count_where_they_are_given(weights, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((1, 64, 64, 3), np.uint8))
    given = SETTINGS | {"model_path": weights, "init_image": str(tmp_path / "images.npz")}
    configs = [merge(IMAGE_GROUPS, ("test", given | more)) for more in ({}, {"strength": 0.5}, {"strength": 0.6})]
    hashes = [hash_of(config) for config in configs]
    assert hashes[0] == hashes[1]
    assert len({PINNED, *hashes}) == 3
    without = identity(resolved(StableDiffusionConfig(model=str(tmp_path))))
    assert not {"init_image", "strength"} & without.keys()


def test_a_folder_of_pictures_is_what_its_pictures_are_in_their_order(tmp_path):
    def of_folder(**files):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "deeper"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        return identity({"init_image": str(folder.parent), "base_samples": str(folder)})

    first = of_folder(a_png="one", b_jpg="two")
    assert first["init_image"] == first["base_samples"]
    assert of_folder(c_png="one", d_PNG="two", e_txt="more") == first
    others = [of_folder(a_png="two", b_jpg="one"), of_folder(a_png="one"), of_folder(a_png="one", b_jpg="2")]
    assert first not in others


def test_another_version_is_another_hash(weights):
    configs = merge(IMAGE_GROUPS, ("test", SETTINGS | {"model_path": weights}))
    assert len({hash_of(configs, version) for version in (1, 2, 3)}) == 3
    assert LatentPipeline.samples_version == 2


@pytest.mark.parametrize(("dtype", "version"), [(torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 2)])
def test_what_bfloat16_made_before_its_first_layer_was_float32_is_begun_anew(dtype, version):
    configs = Configs.of(parse_args("", IMAGE_GROUPS, ["--config", "emoji"]))
    pipeline = image_run(configs, torch.device("cpu"), weights=False).pipeline
    pipeline.network.convert_to(dtype)
    assert pipeline.samples_version == version


def test_samples_of_another_version_are_not_mixed(tmp_path, monkeypatch, capsys):
    """As of a folder from when guide_start was for all guidances."""
    of_all = {"sag_scale": 0, "pag_scale": 1, "guide_start": 1}
    flags = EMBEDDED | of_all | {"num_samples": 1, "out_dir": tmp_path / "out"}
    with monkeypatch.context() as before:
        before.setattr(OtherGuidanceConfig, "on", False)
        run("image_sample", **flags)
    capsys.readouterr()
    assert "samples_version was the default, is 2" in refused(capsys, "image_sample", **flags)


def test_whether_floats_are_tf32_is_set_for_a_run_and_part_of_what_made_it_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "GPU")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for allowed in (True, False):
        with tf32(allowed):
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert made_by(torch.device("cuda"), torch.float32)["tf32"] is allowed
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    assert "tf32" not in made_by(torch.device("cpu"), torch.float32)
