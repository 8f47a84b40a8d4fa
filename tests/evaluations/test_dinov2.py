"""DINOv2's features, against the formulas of what published numbers were computed by."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluating import refused, result
from evaluations.dinov2 import DinoV2, dinov2
from sample_files import pictures

transformers = pytest.importorskip("transformers")


def tiny(folder, image_size=518, hidden_size=32):
    """A random DINOv2 in a folder; its positions are a grid of image_size / 14."""
    config = transformers.Dinov2Config(
        hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    tiny(tmp_path / "dino")
    return tmp_path / "dino"


def cubic(x, a):
    """Keys' cubic kernel."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def antialiased(inputs, outputs):
    """Bicubic (a = −½) with a kernel as wide as the larger pixels, as a matrix [outputs, inputs]."""
    scale = inputs / outputs
    centres = (np.arange(outputs) + 0.5) * scale
    weights = cubic((np.arange(inputs) + 0.5 - centres[:, None]) / max(scale, 1), -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def interpolated(inputs, outputs, scale):
    """Bicubic (a = −¾) at pixels `scale` times denser, the border repeated, as a matrix [outputs, inputs]."""
    places = (np.arange(outputs) + 0.5) / scale - 0.5
    matrix = np.zeros((outputs, inputs))
    for row, place in enumerate(places):
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            matrix[row, np.clip(tap, 0, inputs - 1)] += cubic(place - tap, -0.75)
    return matrix


def features(model, pixels):
    """The class token after the last norm, of pixels [N, 224, 224, 3] in [0, 255], with DINOv2's own positions."""
    x = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    positions = model.embeddings.position_embeddings.detach().double().numpy()[0]
    side = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].reshape(side, side, -1)
    if side != 16:
        matrix = interpolated(side, 16, 16.1 / side)
        grid = np.einsum("yj,xk,jkd->yxd", matrix, matrix, grid)
    with torch.no_grad():
        patches = model.embeddings.patch_embeddings(torch.from_numpy(x).float().permute(0, 3, 1, 2))
        first = model.embeddings.cls_token[0] + torch.from_numpy(positions[:1]).float()
        tokens = patches + torch.from_numpy(grid.reshape(256, -1)).float()
        hidden = torch.cat([first.expand(len(x), 1, -1), tokens], dim=1)
        for layer in model.encoder.layer:
            hidden = layer(hidden)
        return model.layernorm(hidden)[:, 0].numpy()


@pytest.mark.parametrize("image_size", [518, 224])
@pytest.mark.parametrize("side", [40, 224, 300])
def test_both_resizes_against_their_formulas(tmp_path, image_size, side):
    model = tiny(tmp_path, image_size)
    images = pictures(2, side)
    matrix = antialiased(side, 224)
    exact = np.einsum("yj,njxc->nyxc", matrix, np.einsum("xk,njkc->njxc", matrix, images.astype(float)))
    pillow = np.stack([Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images])
    # Pillow makes uint8 of its first pass too.
    rounded = images.astype(float)
    for pass_ in ("xk,njkc->njxc", "yj,njxc->nyxc"):
        rounded = np.einsum(pass_, matrix, rounded).round().clip(0, 255)
    assert np.abs(pillow - rounded).max() <= 1
    rows = {}
    for resize, pixels in (("edm2", exact), ("dgm-eval", pillow)):
        network = dinov2(tmp_path, torch.device("cpu"), resize)
        assert (network.name, network.dimensions) == (f"dinov2-{resize}", 32)
        rows[resize] = network(torch.from_numpy(images).permute(0, 3, 1, 2)).pool.numpy()
        np.testing.assert_allclose(rows[resize], features(model, pixels.astype(float)), atol=2e-5)
    assert np.allclose(rows["edm2"], rows["dgm-eval"], atol=1e-4) == (side == 224)


def test_positions_are_not_those_of_transformers(folder):
    """Whose scale is 16/37: the difference is far above rounding."""
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    images = torch.from_numpy(pictures(2, 224)).permute(0, 3, 1, 2)
    ours = DinoV2(transformers.Dinov2Model.from_pretrained(folder).eval(), "edm2")
    with torch.no_grad():
        theirs = model((images / 255 - ours.mean) / ours.std).pooler_output
        assert (ours(images).pool - theirs).abs().max() > 1e-3


def test_the_evaluator_says_which_resize(tmp_path, folder, capsys):
    np.savez(tmp_path / "few.npz", pictures(5, 32))
    few = (tmp_path / "few.npz", tmp_path / "few.npz", "--features", "dinov2", "--weights", folder)
    for flags, resize in (((), "edm2"), (("--resize", "dgm-eval"), "dgm-eval")):
        found = result(tmp_path, *few, *flags)
        assert abs(found["metrics"]["frechet_distance"]["value"]) < 1e-6
        assert (found["features"], found["provenance"]["resize"]) == ("dinov2", resize)
        assert f"dinov2 features, resize as {resize}\n" in capsys.readouterr().out
    assert sorted(path.name[:12] for path in (tmp_path / "cache" / "features").iterdir()) == [
        "dinov2-dgm-e", "dinov2-edm2-"
    ]  # fmt: skip
    assert "--resize: only --features dinov2 has several" in refused(capsys, *few[:2], "--resize", "edm2")


def test_a_folder_that_holds_another_model_is_refused(tmp_path, folder, capsys):
    np.savez(tmp_path / "few.npz", pictures(5, 32))
    few = (tmp_path / "few.npz", tmp_path / "few.npz", "--features", "dinov2", "--weights", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "model.safetensors holds no encoder.layer.2." in refused(capsys, *few)
    (folder / "config.json").write_text("{}")
    assert "not a DINOv2 model" in refused(capsys, *few)
