"""References that papers use: statistics of any features, and what makes numbers not comparable with theirs."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from evaluating import refused, result
from evaluations import evaluation
from evaluations.emoji import emoji_features
from guided_diffusion.storage import pictures as storage
from sample_files import pictures, shard

EMOJI = ("--features", "emoji")


def gaussian(dimensions, shift=0.0):
    return {"mu": np.full(dimensions, shift), "sigma": np.eye(dimensions)}


@pytest.fixture
def samples(tmp_path):
    np.savez(tmp_path / "samples.npz", pictures(150, 32, seed=1))
    return tmp_path / "samples.npz"


@pytest.fixture
def of_emoji():
    rows = emoji_features()(torch.from_numpy(pictures(330, 32)).permute(0, 3, 1, 2)).pool.double().numpy()
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows.T)}


def test_statistics_of_other_features(tmp_path, samples, of_emoji):
    """They give what their images give, and a file that does not say what it holds is told."""
    np.savez(tmp_path / "images.npz", pictures(330, 32))
    wanted = result(tmp_path, tmp_path / "images.npz", samples, *EMOJI)["metrics"]["frechet_distance"]["value"]
    reference = tmp_path / "statistics.npz"
    for said, is_told in (({}, True), ({"features": "emoji"}, False)):
        np.savez(reference, **of_emoji, **said)
        found = result(tmp_path, reference, samples, *EMOJI)
        assert found["metrics"]["frechet_distance"]["value"] == pytest.approx(wanted, rel=1e-6)
        assert found["provenance"]["reference"]["statistics_of"] == said.get("features")
        told = f"the statistics of {reference} may be of any features, not said to be of emoji"
        assert (told in found["comparable"]["because"]) == is_told
    with open(tmp_path / "statistics.pkl", "wb") as file:
        pickle.dump({"emoji": of_emoji}, file)
    found = result(tmp_path, tmp_path / "statistics.pkl", samples, *EMOJI)
    assert found["metrics"]["frechet_distance"]["value"] == pytest.approx(wanted, rel=1e-6)


def test_statistics_that_do_not_fit(tmp_path, samples, capsys):
    for sentence, arrays in {
        "mu: wanted 320 dimensions, got 321": gaussian(321),
        "holds statistics of inception features, wanted those of emoji": gaussian(2048),
        "holds statistics of dinov2-edm2 features, wanted those of emoji": gaussian(320) | {"features": "dinov2-edm2"},
        "features: wanted a name like dinov2-edm2, got float64 [2]": gaussian(320) | {"features": np.ones(2)},
    }.items():
        np.savez(tmp_path / "statistics.npz", **arrays)
        assert sentence in refused(capsys, tmp_path / "statistics.npz", samples, *EMOJI)
    np.savez(tmp_path / "other.npz", **gaussian(5))
    np.savez(tmp_path / "statistics.npz", **gaussian(6))
    assert "statistics.npz: mu: wanted 5 dimensions, got 6" in refused(
        capsys, tmp_path / "other.npz", tmp_path / "statistics.npz", *EMOJI
    )


def test_images_beside_statistics_of_other_features_are_used(tmp_path, samples):
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=pictures(330, 32), **gaussian(2048))
    np.savez(tmp_path / "images.npz", pictures(330, 32))
    metrics = [result(tmp_path, tmp_path / name, samples, *EMOJI)["metrics"] for name in ("VIRTUAL.npz", "images.npz")]
    assert metrics[0] == metrics[1]


def test_pickles_of_edm2(tmp_path, samples, capsys):
    for name, shift in (("a.pkl", 0.0), ("b.pkl", 0.1)):
        with open(tmp_path / name, "wb") as file:
            pickle.dump({"num_images": 50_000, "fid": gaussian(2048, shift), "fd_dinov2": gaussian(8, shift)}, file)
    both = tmp_path / "a.pkl", tmp_path / "b.pkl"
    # Two statistics need no network.
    found = result(tmp_path, *both)
    assert found["metrics"]["fid"]["value"] == pytest.approx(2048 * 0.01)
    assert found["provenance"]["reference"]["statistics_of"] == "inception"
    assert "holds no mu_s" in found["missing"]["sfid"]
    found = result(tmp_path, *both, "--features", "dinov2")
    assert found["metrics"]["frechet_distance"]["value"] == pytest.approx(8 * 0.01)
    assert not any("the statistics of" in reason for reason in found["comparable"]["because"])
    found = result(tmp_path, *both, "--features", "dinov2", "--resize", "dgm-eval")
    told = f"the statistics of {both[0]} are of dinov2-edm2, not said to be of dinov2-dgm-eval"
    assert told in found["comparable"]["because"]
    assert "wanted statistics of emoji features, got fid (inception), fd_dinov2 (dinov2-edm2)" in refused(
        capsys, both[0], samples, *EMOJI
    )
    for sentence, entry in {
        "fid: wanted arrays mu and sigma, got no sigma": {"mu": np.zeros(3)},
        "fid: sigma: wanted a symmetric matrix": gaussian(3) | {"sigma": np.triu(np.ones((3, 3)))},
        "fid: mu: wanted floats [D], got int64 [3]": gaussian(3) | {"mu": np.arange(3)},
        "fid: mu: wanted finite numbers": gaussian(3) | {"mu": np.full(3, np.nan)},
        "a.pkl: mu: wanted 2048 dimensions, got 3": gaussian(3),
    }.items():
        both[0].write_bytes(pickle.dumps({"fid": entry}))
        assert sentence in refused(capsys, *both)
    both[0].write_bytes(b'\x80\x04cos\nsystem\n\x8c\x10touch "executed"\x85R.')
    assert "nothing of it was executed" in refused(capsys, *both)
    assert not os.path.exists("executed")


def test_dinov2_of_statistics_needs_a_network_of_their_dimension(tmp_path, samples, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=224, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    np.savez(samples, pictures(12, 16))
    flags = (samples, "--features", "dinov2", "--weights", tmp_path / "dino")
    reference = tmp_path / "img512.pkl"
    reference.write_bytes(pickle.dumps({"fd_dinov2": gaussian(8)}))
    assert result(tmp_path, reference, *flags)["metrics"]["frechet_distance"]["error"] > 0
    reference.write_bytes(pickle.dumps({"fd_dinov2": gaussian(1024)}))
    assert "img512.pkl: mu: wanted 8 dimensions, got 1024" in refused(capsys, reference, *flags)


def test_the_rule_that_made_uint8(tmp_path, samples):
    """What a run says of itself, where it is not guided-diffusion's, is among the reasons."""
    assert storage.UINT8_RULES[False] == evaluation.UINT8
    levels = torch.arange(256).float()
    x = torch.cat([(levels + 0.49) / 127.5 - 1, (levels + 0.51) / 127.5 - 1, (levels + 0.99) / 127.5 - 1])
    by_rule = (127.5 * x + 127.5).trunc().clamp(0, 255)
    assert (storage.to_uint8(x.view(1, 1, 1, -1)).ravel() == by_rule.numpy()).all()
    run = tmp_path / "run"
    shard(run / "shards", 0, pictures(150, 32))
    for rule, is_told in ((storage.UINT8_RULES[False], False), (storage.UINT8_RULES[True], True), (None, False)):
        said = {} if rule is None else {"uint8": rule}
        (run / "manifest.json").write_text(json.dumps({"samples": 150, **said}))
        found = result(tmp_path, samples, run, *EMOJI)
        told = f"uint8 of {run} are trunc(127.5x + 128), guided-diffusion's trunc(127.5x + 127.5)"
        assert (told in found["comparable"]["because"]) == is_told
        assert found["provenance"]["samples"]["run"] == said
