"""stable_diffusion_sample.py as a user runs it: what it writes, that it goes on and repeats, and bad input."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import latents
from guided_diffusion.settings.shipped import how_to_install
from guided_diffusion.settings.stable_diffusion import StableDiffusionConfig
from guided_diffusion.stable_diffusion.sampling import read_prompts
from running import SCRIPTS, ended, mpiexec, refused, run

MODEL = latents.DATA / "model"
SCRIPT = "stable_diffusion_sample"

# numpy's about tensors, in several schedulers of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(autouse=True)
def extra():
    latents.diffusers()


@pytest.fixture
def flags(tmp_path):
    return {
        "model": MODEL, "prompt": "a cat", "steps": 2, "height": 64, "width": 96, "num_images": 3, "batch_size": 2,
        "out_dir": tmp_path / "out",
    }  # fmt: skip


def samples(folder):
    [path] = Path(folder).glob("samples_*.npz")
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        return path.name, file["arr_0"]


def test_what_a_run_writes(flags, capsys):
    run(SCRIPT, **flags)
    folder = flags["out_dir"]
    name, images = samples(folder)
    assert name == "samples_3x64x96x3.npz"
    assert images.shape == (3, 64, 96, 3)
    assert len(np.unique(images)) > 10
    for index, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(folder / "images" / f"{index:06d}.png")), image)
    width, height = Image.open(folder / "comparison.png").size
    assert width > 3 * 96
    assert height > 64
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["network_evaluations_per_sample"] == 6
    assert manifest["settings"]["scheduler"] == ""
    assert manifest["guidance"] == (
        "DDIMScheduler, 2 network calls; classifier-free guidance: 7.5; self-attention guidance: s = 0.75, ψ = 1, "
        "σ = 1 in eps, 2 of 2 calls"
    )
    assert set(manifest["made_by"][0]["versions"]) >= {"diffusers", "transformers"}
    # The same folder again makes nothing; more images go into it; its own configuration repeats it.
    capsys.readouterr()
    run(SCRIPT, **flags | {"compare": 0})
    assert "0 samples" in capsys.readouterr().out
    run(SCRIPT, config=folder / "config.yaml", out_dir=folder.parent / "again", compare=0)
    assert np.array_equal(samples(folder.parent / "again")[1], images)
    assert not (folder.parent / "again" / "comparison.png").exists()
    (folder / name).unlink()
    run(SCRIPT, **flags | {"compare": 0, "num_images": 4})
    assert np.array_equal(samples(folder)[1][:2], images[:2])


def test_images_go_round_the_prompts(flags, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\nthe dog runs\n")
    del flags["prompt"]
    run(SCRIPT, **flags | {"num_images": 2, "compare": 0, "prompts": tmp_path / "prompts.txt"})
    images = samples(flags["out_dir"])[1]
    assert len(images) == 4
    run(SCRIPT, **flags | {"num_images": 3, "compare": 0, "prompt": "a cat", "out_dir": tmp_path / "cat"})
    cat = samples(tmp_path / "cat")[1]
    assert np.abs(images[[0, 2]].astype(int) - cat[[0, 2]]).max() <= 1
    assert np.abs(images[1].astype(int) - cat[1]).max() > 1


def test_the_mark_of_windows_editors_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    config = StableDiffusionConfig(model=str(MODEL), prompts=str(tmp_path / "prompts.txt"))
    assert read_prompts(config) == ["a cat", "a dog"]


@pytest.mark.parametrize("wrong", [{"model": "nowhere"}, {"model": MODEL, "scheduler": "best"}, {"model": SCRIPTS}])
def test_wrong_names_are_said_before_the_slow_imports(wrong, monkeypatch, capsys):
    for library in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)  # whose import would be what is said
    assert refused(capsys, SCRIPT, **wrong).startswith(("error: model: ", "error: scheduler: 'best' is none of ddim"))


def spoiled_model(tmp_path, part, name, change):
    """A copy of the model with one tensor of a part changed."""
    folder = shutil.copytree(MODEL, tmp_path / "spoiled")
    file = folder / part / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state[name] = change(state[name])
    save_file(state, file)
    return folder


@pytest.mark.parametrize(
    ("part", "name", "change", "more", "said"),
    [
        ("unet", "conv_in.weight", lambda x: x * float("nan"), {}, "samples 0, 1 are not finite after the step t = 1"),
        ("unet", "conv_in.weight", lambda x: x * 1e6, {"dtype": "float16"}, "float16 overflows: try bfloat16"),
        ("vae", "decoder.conv_in.bias", lambda x: x * float("nan"), {}, "samples 0 to 1: after decoding, images 0, 1"),
    ],
)
def test_pictures_of_what_is_not_finite_are_not_written(flags, tmp_path, capsys, part, name, change, more, said):
    model = spoiled_model(tmp_path, part, name, change)
    assert said in refused_later(capsys, **flags | {"model": model} | more)
    assert not [file for file in flags["out_dir"].rglob("*") if file.suffix in (".npz", ".png")]


def test_a_single_file_makes_what_its_folder_makes(flags, tmp_path):
    run(SCRIPT, **flags | {"compare": 0})
    file = latents.single_file(tmp_path / "tiny.safetensors")
    run(SCRIPT, **flags | {"compare": 0, "model": file, "model_config": MODEL, "out_dir": tmp_path / "file"})
    one, other = samples(flags["out_dir"])[1], samples(tmp_path / "file")[1]
    assert np.abs(one.astype(int) - other).max() <= 1


def test_flags_change_what_they_say(flags, tmp_path, capsys):
    made = {}
    for name, more in {
        "as it is": {},
        "alone": {"prompt": "", "guidance_scale": 1},
        "off": {"sag_scale": 0},
        "diffusers": {"preset": "diffusers"},
        "seed": {"seed": 1},
        "heun": {"scheduler": "heun", "spacing": "karras"},
        "layer": {"sag_block": "up_blocks.2.attentions.0.transformer_blocks.0.attn1", "sag_space": "model"},
        "half": {"dtype": "bfloat16"},
    }.items():
        run(SCRIPT, **flags | {"num_images": 1, "compare": 0, "out_dir": tmp_path / name} | more)
        made[name] = samples(tmp_path / name)[1]
    # For a network that predicts ε the presets are one rule.
    assert np.array_equal(made.pop("diffusers"), made["as it is"])
    assert len({images.tobytes() for images in made.values()}) == len(made)
    evaluations = [
        json.loads((tmp_path / name / "manifest.json").read_text())["network_evaluations_per_sample"]
        for name in ("as it is", "alone", "off", "heun")
    ]
    assert evaluations == [6, 4, 4, 9]
    assert "HeunDiscreteScheduler, 3 network calls" in capsys.readouterr().err


def test_two_ranks_make_the_same_bytes(flags, tmp_path):
    run(SCRIPT, **flags | {"compare": 1})
    more = flags | {"compare": 1, "out_dir": tmp_path / "ranks"}
    words = [str(part) for key in more for part in (f"--{key}", more[key])]
    job = mpiexec(2, [str(SCRIPTS / f"{SCRIPT}.py"), *words])
    _, errors = ended(job)
    assert job.returncode == 0, errors
    assert json.loads((tmp_path / "ranks" / "manifest.json").read_text())["ranks"] == 2
    for name in ("samples_3x64x96x3.npz", "comparison.png", "images/000002.png"):
        assert (tmp_path / "ranks" / name).read_bytes() == (flags["out_dir"] / name).read_bytes()


def test_another_model_in_the_same_folder_is_refused(flags, capsys, tmp_path):
    run(SCRIPT, **flags | {"num_images": 1, "compare": 0})
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    run(SCRIPT, **flags | {"num_images": 1, "compare": 0, "model": copy})
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.011"))
    capsys.readouterr()
    assert "model was" in refused_later(capsys, **flags | {"num_images": 1, "compare": 0, "model": copy})


def refused_later(capsys, **flags):
    """The last line of a run that is refused after it has said what it would do."""
    with pytest.raises(SystemExit) as stop:
        run(SCRIPT, **flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


BAD = [
    ({"model": "nowhere"}, "model: no such file or folder 'nowhere'"),
    ({"model": Path(__file__).parent}, "has no 'unet'; wanted a model folder of diffusers' format"),
    ({"model": ""}, "model: give a local folder"),
    ({"model": __file__}, "model: not a folder, nor a .safetensors file"),
    ({"scheduler": "best"}, "scheduler: 'best' is none of ddim, ddpm, pndm"),
    ({"spacing": "wide"}, "spacing: 'wide' is none of leading"),
    ({"scheduler": "ddim", "spacing": "karras"}, "DDIMScheduler has no karras; it has leading"),
    ({"steps": 0}, "steps: wanted 1 or more, got 0"),
    ({"steps": 2000}, "cannot make 2000 steps"),
    ({"steps": 1000}, "begins 1000 steps at timestep 1000, of 0 to 999, the last of which is noise; give --spacing"),
    ({"scheduler": "pndm", "steps": 1001}, "PNDMScheduler cannot make 1001 steps"),
    ({"scheduler": "ddim", "spacing": "linspace"}, "steps of another length than linspace has; give --spacing leading"),
    ({"scheduler": "lcm", "steps": 90}, "LCMScheduler cannot make 90 steps"),
    ({"height": 100}, "height: wanted a multiple of 8, got 100"),
    ({"width": -8}, "width: wanted 0 or more"),
    ({"prompt": "a cat and the dog run over the hills"}, "the text encoder reads 14; "),
    ({"negative_prompt": "a cat and the dog run over the hills"}, "negative_prompt: 'a cat"),
    ({"prompts": "nowhere.txt"}, "prompt, prompts: two ways"),
    ({"prompt": "", "prompts": "nowhere.txt"}, "prompts: no such file or folder 'nowhere.txt'"),
    ({"prompt": "", "prompts": MODEL}, "model: cannot be read (IsADirectoryError)"),
    ({"num_images": 0}, "num_images: wanted 1 or more"),
    ({"batch_size": 0}, "batch_size: wanted 1 or more"),
    ({"guidance_scale": "nan"}, "guidance_scale: wanted a finite number"),
    ({"sag_scale": "inf"}, "wanted a finite number, got inf"),
    ({"sag_block": "mid_block.7"}, "no self-attention 'mid_block.7' in this UNet; it has: down_blocks.0"),
    ({"sag_space": "pixels"}, "sag_space: wanted eps or model"),
    ({"preset": "best"}, "preset: wanted paper, diffusers"),
    ({"blur_kernel": 4}, "blur_kernel: wanted an odd number"),
    ({"guide_interval": "1"}, "guide_interval: wanted lo,hi"),
    ({"dtype": "int8"}, "dtype: wanted float32, bfloat16, float16"),
    ({"image": "picture.png"}, "image: no such file or folder 'picture.png'"),
    ({"image": __file__}, "no inpainting model"),
    ({"compare": -1}, "compare: wanted 0 or more"),
    ({"sag_skale": 1}, "did you mean --sag_scale?"),
    ({"sag-scale": 1}, "did you mean --sag_scale?"),
    ({"num_inference_steps": 20}, "did you mean --steps?"),
    ({"num_images_per_prompt": 2}, "did you mean --num_images?"),
    ({"cfg_scale": 2}, "did you mean --guidance_scale, which is 1 + cfg_scale?"),
    ({"model_path": "x"}, "did you mean --model?"),
    ({"sampler": "ddim"}, "did you mean --scheduler?"),
]


@pytest.mark.parametrize(("wrong", "said"), BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(flags, capsys, wrong, said):
    assert said in refused(capsys, SCRIPT, **flags | wrong)
    assert not flags["out_dir"].exists()


def test_without_the_extra_the_command_to_install_it_is_said(flags, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert how_to_install("stable-diffusion") in refused(capsys, SCRIPT, **flags)
