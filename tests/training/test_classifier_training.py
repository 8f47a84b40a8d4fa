"""Training of noisy-image classifiers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.commands import classifier_train
from guided_diffusion.diffusion.noise import choice
from guided_diffusion.diffusion.process import ForwardProcess, get_named_beta_schedule
from guided_diffusion.networks.building import build_classifier
from guided_diffusion.script_util import create_gaussian_diffusion, create_model_and_diffusion
from guided_diffusion.settings.model import ClassifierConfig
from guided_diffusion.settings.shipped import read_yaml
from guided_diffusion.settings.training import ClassifierTrainingConfig
from guided_diffusion.storage.checkpoints import load_into
from guided_diffusion.training.classifier import ClassifierLoop, accuracy_by_noise
from running import refused, run
from trainings import assert_same, log_of

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "classifier_width": 64, "classifier_depth": 1, "classifier_channel_mult": "1,1", "classifier_pool": "adaptive",
    "classifier_attention_resolutions": "8", "classifier_resblock_updown": False,
}  # fmt: skip
# Two classes that are told apart by their mean.
DARK = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
IMAGES, LABELS = torch.cat([DARK, DARK + 1]), torch.tensor([0] * 4 + [1] * 4)
PROCESS = ForwardProcess(get_named_beta_schedule("cosine", 1000))


def data(_step):
    return iter(lambda: (IMAGES, {"y": LABELS}), None)


def loop_of(folder, **settings):
    torch.manual_seed(0)
    network = build_classifier(16, ClassifierConfig(**SMALL), 2)
    config = ClassifierTrainingConfig(
        out_dir=str(folder), batch_size=8, lr=1e-3, iterations=30, log_interval=10, save_interval=10, eval_interval=5
    )
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    return ClassifierLoop(network, diffusion, data, replace(config, **settings), data)


def test_the_loss_falls_and_the_log_has_both_accuracies(tmp_path):
    loop_of(tmp_path).run()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == ["10", "20", "30"]
    assert float(lines[-1]["loss"]) < 0.8 * float(lines[0]["loss"])
    assert {"acc@1", "acc@1_q0", "val_loss", "val_acc@1"} <= set(lines[0])
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        "checkpoint.pt", "checkpoint_before.pt", "model000010.pt", "model000020.pt", "model000030.pt"
    }  # fmt: skip


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole = loop_of(tmp_path / "whole", iterations=20)
    whole.run()
    first = loop_of(tmp_path / "parts", iterations=10)
    first.run()
    second = loop_of(tmp_path / "parts", iterations=20)
    assert second.step == 10
    second.run()
    assert_same(second.network.parameters(), whole.network.parameters())
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_anneal_lr_falls_to_nothing():
    config = ClassifierTrainingConfig(iterations=100, lr=1.0)
    assert config.learning_rate(99) == 1.0
    falling = replace(config, anneal_lr=True)
    assert [falling.learning_rate(step) for step in (0, 50, 99)] == pytest.approx([1.0, 0.5, 0.01])


@pytest.mark.parametrize("noised", [True, False])
def test_the_network_sees_noised_images_with_their_timesteps(tmp_path, noised):
    loop = loop_of(tmp_path, noised=noised)
    seen = []
    network = loop.network

    class Spy(torch.nn.Module):
        def forward(self, x, t):
            seen.append((x.detach(), t))
            return network(x, t)

    loop.shared_network = Spy()
    loop.train_step(IMAGES, {"y": LABELS})
    [(x, t)] = seen
    if noised:
        # What is left when the image is taken out is noise of unit variance, at the told timesteps.
        alpha_bar = torch.from_numpy(PROCESS.alphas_cumprod)[t].float().reshape(-1, 1, 1, 1)
        noise = (x - alpha_bar.sqrt() * IMAGES) / (1 - alpha_bar).sqrt()
        assert len(set(t.tolist())) > 1
        assert (noise.flatten(1).std(dim=1) - 1).abs().max() < 0.12
    else:
        assert torch.equal(x, IMAGES)
        assert not t.any()


def test_accuracy_by_noise_of_a_classifier_that_is_known():
    def by_mean(x, _t):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)

    early, late = accuracy_by_noise(by_mean, PROCESS, IMAGES, LABELS, [0, 999], draws=50)
    assert early == 1.0
    assert 0.4 < late < 0.6


@pytest.fixture
def folders(tmp_path):
    for folder in ("train", "held_out"):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(IMAGES):
            pixels = ((image.permute(1, 2, 0) + 1) * 127.5).numpy().astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{'ab'[int(LABELS[i])]}_{i}.png")
    return {"data_dir": tmp_path / "train", "val_data_dir": tmp_path / "held_out", "out_dir": tmp_path / "run"}


SIZES = SMALL | {"image_size": 16, "num_classes": 2, "iterations": 2, "batch_size": 4, "save_interval": 2}


def test_the_script_leaves_what_a_sampler_needs(folders, tmp_path, capsys):
    run("classifier_train", **folders, **SIZES)
    assert {path.name for path in folders["out_dir"].iterdir()} == {
        ".lock", "checkpoint.pt", "model000002.pt", "config.yaml", "classes.json", "accuracy.json"
    }  # fmt: skip
    assert json.loads((folders["out_dir"] / "classes.json").read_text()) == ["a", "b"]
    accuracy = json.loads((folders["out_dir"] / "accuracy.json").read_text())
    assert accuracy["t"] == list(range(0, 1000, 100))
    assert all(len(accuracy[str(folders[key])]) == 10 for key in ("data_dir", "val_data_dir"))
    assert accuracy["images"] == {str(folders[key]): 8 for key in ("data_dir", "val_data_dir")}
    said = capsys.readouterr().out
    assert said.index("the weights are") < said.index("accuracy at t") < said.index("held_out (N = 8): ")
    network = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "class_cond": True, "num_classes": 2}
    model, _ = create_model_and_diffusion(**network, image_size=16)
    torch.save(model.state_dict(), tmp_path / "network.pt")
    run(
        "classifier_sample", config=folders["out_dir"] / "config.yaml", model_path=tmp_path / "network.pt",
        classifier_path=folders["out_dir"] / "model000002.pt", num_samples=1, timestep_respacing=2,
        out_dir=tmp_path / "out", **network,
    )  # fmt: skip
    assert "classifier guidance: scale 1" in capsys.readouterr().err


def test_validation_sees_the_middle_of_pictures_that_training_crops(folders, monkeypatch):
    """The crop of a training picture is random, that of a picture to validate on is none, as upstream."""
    seen = {}

    def load_data(data_dir, random_crop, **_):
        seen[data_dir] = random_crop
        return data(0)

    monkeypatch.setattr("guided_diffusion.training.run.load_data", load_data)
    run("classifier_train", **folders, **SIZES)
    assert seen == {str(folders["data_dir"]): True, str(folders["val_data_dir"]): False}


def test_accuracy_is_of_so_many_pictures_at_most(folders, monkeypatch):
    monkeypatch.setattr(classifier_train, "MOST_IMAGES", 5)
    monkeypatch.setattr(classifier_train, "IMAGES_AT_A_TIME", 2)
    loop = loop_of(folders["out_dir"])
    seen = []

    def right(_network, _process, images, _labels, steps, _draws, seed):
        seen.append(images)
        return [float(seed == 0)] * len(steps)

    monkeypatch.setattr(classifier_train, "accuracy_by_noise", right)
    folder = str(folders["data_dir"])
    found = classifier_train.accuracies(loop, [folder], 16, seed=3)
    assert found["images"] == {folder: 5}
    assert found[folder] == [0.4] * 10  # of the first two of five
    files = sorted(folders["data_dir"].iterdir())
    wanted = np.stack([np.asarray(Image.open(files[i])) for i in choice(3, 8)[:5]])
    pixels = ((torch.cat(seen).permute(0, 2, 3, 1) + 1) * 127.5).round().numpy()
    assert np.array_equal(pixels, wanted)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_classes": 1}, "num_classes: 1, but data_dir has 2 classes"),
        ({"iterations": 0}, "iterations: wanted 1 or more"),
        ({"eval_interval": 0}, "eval_interval: wanted 1 or more"),
        ({"lr": -1}, "lr: wanted more than 0"),
        ({"data_dir": "nowhere"}, "data_dir: no such file or folder 'nowhere'"),
        ({"classifier_channel_mult": "1,x"}, "classifier_channel_mult: wanted float, got 'x'"),
        ({"schedule_sampler": "best"}, "schedule_sampler: 'best' is neither"),
        ({"num_channels": 4}, "unknown flag --num_channels"),
    ],
)
def test_wrong_flags_are_one_sentence(folders, capsys, wrong, said):
    assert said in refused(capsys, "classifier_train", **folders | SIZES | wrong)
    assert not folders["out_dir"].exists()


def test_other_classes_to_validate_on_are_refused(folders, capsys):
    for path in folders["val_data_dir"].glob("a_*"):
        path.unlink()
    assert "val_data_dir: wanted the classes a, b, got b" in refused(capsys, "classifier_train", **folders, **SIZES)


EMOJI = ["--config", CONFIGS / "emoji.yaml", "--config", CONFIGS / "emoji_classifier.yaml"]


def test_the_embedded_classifier_pulls_samples_to_their_class(tmp_path):
    assert (CONFIGS / "models" / "emoji32_classifier.safetensors").stat().st_size <= 3e6
    config = read_yaml(str(CONFIGS / "emoji_classifier.yaml"))
    keys = {key: value for key, value in config.items() if key in vars(ClassifierConfig())}
    classifier = build_classifier(32, ClassifierConfig(**keys), 3)
    load_into(classifier, str(CONFIGS / "models" / "emoji32_classifier.safetensors"))
    flags = {"num_samples": 12, "batch_size": 12, "timestep_respacing": 10, "sag_scale": 0}
    shares = []
    for scale in (0, 6):
        folder = tmp_path / str(scale)
        run("classifier_sample", *EMOJI, **flags, balanced_labels=True, out_dir=folder, classifier_scale=scale)
        with np.load(folder / "samples_12x32x32x3.npz") as file:
            images, labels = torch.from_numpy(file["arr_0"]), torch.from_numpy(file["arr_1"])
        x = images.permute(0, 3, 1, 2) / 127.5 - 1
        log_probs = classifier.eval()(x, torch.zeros(12)).log_softmax(dim=1).detach()
        shares.append(float(log_probs.gather(1, labels[:, None]).mean()))
    assert shares[1] > shares[0] + 0.1


def test_the_embedded_classifier_goes_with_the_other_guidances(tmp_path):
    flags = {"num_samples": 2, "batch_size": 2, "timestep_respacing": 3, "sag_scale": 0.5, "cfg_scale": 1}
    run("classifier_sample", *EMOJI, **flags, out_dir=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["network_evaluations_per_sample"] == 9
    assert [line.partition(":")[0] for line in manifest["guidance"].splitlines()] == [
        "self-attention guidance", "classifier-free guidance", "classifier guidance"
    ]  # fmt: skip
