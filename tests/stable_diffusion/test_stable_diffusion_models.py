"""Stable Diffusion of other kinds than the golden model, and what users attach to it: on small random networks."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import latents
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance
from guided_diffusion.guidance.masked_blur import MaskGuidance
from guided_diffusion.guidance.masks import everywhere
from guided_diffusion.settings.stable_diffusion import LatentGuidanceConfig, StableDiffusionConfig
from guided_diffusion.stable_diffusion.attention import find_layer
from guided_diffusion.stable_diffusion.model import load
from guided_diffusion.stable_diffusion.sampling import LatentPipeline, build_latent_guidance, latent_guidance
from guided_diffusion.stable_diffusion.schedulers import choose_scheduler
from latents import final, golden_model, golden_scheduler, noise, trajectory

# numpy's about tensors, in several schedulers of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIZE = 64, 64


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """Makes the folder of a kind of model once."""
    latents.diffusers()
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = latents.variant(tmp_path_factory.mktemp("models") / kind, kind)
        return made[kind]

    return folder


def near(got, wanted, tolerance):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def sampler(model, prompts=("a cat", "the dog runs"), guidance=None, **settings):
    config = StableDiffusionConfig(**{"model": "m", "steps": 3, "height": 64, "width": 64} | settings)
    guidances = build_latent_guidance(model.unet, guidance or LatentGuidanceConfig())
    return LatentPipeline(config, model, prompts, guidances)


def samples(made_by, indices):
    """(latents, UNet evaluations, condition of the last prediction)."""
    for state, guided in made_by.trajectory(indices):
        assert state.x.isfinite().all()
    return state.x, guided.evaluations, state.prediction.condition


@pytest.mark.parametrize(("scheduler", "scale"), [("ddim", 7.5), ("dpm++", 7.5), ("euler_a", 7.5), ("lcm", 1.5)])
def test_a_batch_is_its_samples_alone(scheduler, scale):
    made_by = sampler(golden_model(), scheduler=scheduler, guidance_scale=scale)
    together, evaluations, _ = samples(made_by, range(4))
    assert evaluations == 3 * 3
    for index in range(4):
        alone, _, _ = samples(made_by, [index])
        near(alone[0], together[index], 1e-4)
    assert (together[0] - together[2]).abs().max() > 1
    assert made_by.num_samples == 2


def test_what_is_passed_to_the_unet_in_each_mode():
    for scale, sag_scale, evaluations in [(1, 0, 1), (1, 0.75, 2), (7.5, 0, 2), (7.5, 0.75, 3)]:
        made_by = sampler(golden_model(), guidance_scale=scale, guidance=LatentGuidanceConfig(sag_scale=sag_scale))
        assert samples(made_by, [0])[1] == evaluations * 3
        assert made_by.num_steps == 3


def test_interval_and_every_save_passes():
    for settings, evaluations in [({"guide_interval": "0,0.5"}, 4 * 2 + 2), ({"guide_every": 2}, 4 * 2 + 2)]:
        made_by = sampler(golden_model(), steps=4, guidance=LatentGuidanceConfig(**settings))
        assert samples(made_by, [0])[1] == evaluations
    schedules = {"cfg_schedule": "t=0,0.5", "guidance": LatentGuidanceConfig(sag_schedule="sigma=3,inf")}
    made_by = sampler(golden_model(), steps=4, **schedules)
    assert made_by.describe().split("; ")[1] == "classifier-free guidance: 7.5, 2 of 4 calls"
    assert made_by.describe().endswith("1 of 4 calls")
    assert samples(made_by, [0])[1] == 4 + 2 + 1
    with pytest.raises(ValueError, match="cfg_schedule: wanted words"):
        sampler(golden_model(), cfg_schedule="0,1")


def test_guidances_beside_self_attention_are_said_and_shown():
    [sag] = build_latent_guidance(golden_model().unet, LatentGuidanceConfig())
    [other] = build_latent_guidance(golden_model().unet, LatentGuidanceConfig(sag_scale=0.5, guide_interval="0,0.5"))
    everything = MaskGuidance(masking=everywhere, scale=2.0, blur_sigma=1.0)
    made_by = replace(sampler(golden_model()), guidances=[sag, other, everything])
    assert made_by.describe().split("; ")[2:] == [
        "self-attention guidance: s = 0.75, ψ = 1, σ = 1 in eps, 3 of 3 calls",
        "self-attention guidance: s = 0.5, ψ = 1, σ = 1 in eps, 2 of 3 calls",
        "MaskGuidance: s = 2, 3 of 3 calls",
    ]
    alone = replace(made_by, guidances=[everything])
    assert made_by.comparison(1).shape == alone.comparison(1).shape
    assert not np.array_equal(made_by.comparison(1), alone.comparison(1))


def test_xl(folders):
    model = load(str(folders("xl")))
    assert model.is_xl
    condition = model.encode(["a cat", "the dog runs"], 64, 96)
    assert condition["encoder_hidden_states"].shape == (2, 16, 32)
    assert condition["added_cond_kwargs"]["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    first, second = model.text_encoders
    ids = model.tokenizers[0](["a cat"], padding="max_length", return_tensors="pt").input_ids
    outputs = first(ids, output_hidden_states=True), second(ids, output_hidden_states=True)
    joined = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    near(condition["encoder_hidden_states"][:1], joined, 1e-6)
    near(condition["added_cond_kwargs"]["text_embeds"][:1], outputs[1].text_embeds, 1e-6)
    assert not model.encode_negative("", 1, 64, 96)["encoder_hidden_states"].any()
    assert model.encode_negative("dog", 1, 64, 96)["encoder_hidden_states"].any()
    made_by = sampler(model, height=64, width=96, guidance_scale=2)
    latent, evaluations, _ = samples(made_by, [0, 1])
    assert latent.shape == (2, 4, 8, 12)
    assert evaluations == 9
    near(samples(made_by, [1])[0][0], latent[1], 1e-4)


def test_sd2_with_a_zero_terminal_snr(folders):
    model = load(str(folders("sd2")))
    assert find_layer(model.unet).layer.heads == 4
    condition = model.encode(["a cat"], *SIZE)
    negative = model.encode([""], *SIZE)
    by_prompt = ClassifierFreeGuidance(scale=6.5, null=lambda _condition: negative)
    for space in ("eps", "model"):
        guidances = [by_prompt, latent_guidance(model.unet, 0.75, space=space)]
        states, guided, kept = trajectory(model.unet, model.scheduler, noise(1, 8, 8), condition, guidances)
        first = next(states).prediction
        assert first.process.alphas[-1] == 0
        # Nothing of the image is in x_t: x̂_t is x_t, and prompts guide x̂_0 alone, which is −v.
        both, degraded = kept.predictions
        assert torch.equal(degraded.x_t, first.x_t)
        cond, uncond = both.output
        near(first.output[0], uncond + 7.5 * (cond - uncond), 1e-4)
        assert (cond - uncond).abs().max() > 0.05
        for state in states:
            assert state.x.isfinite().all()
        assert guided.evaluations == 15


def test_inpainting(folders, tmp_path):
    model = load(str(folders("inpaint")))
    assert model.inpaints
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "picture.png")
    Image.linear_gradient("L").save(tmp_path / "mask.png")
    given = {"image": str(tmp_path / "picture.png"), "image_mask": str(tmp_path / "mask.png")}
    made_by = sampler(model, **given)
    assert made_by.inpaint.shape == (1, 5, 8, 8)
    assert made_by.inpaint[0, 0].tolist() == [[0.0] * 8] * 4 + [[1.0] * 8] * 4
    _, evaluations, condition = samples(made_by, [0, 1])
    assert evaluations == 9
    assert torch.equal(condition["inpaint"], made_by.inpaint.expand(2, -1, -1, -1))
    for wrong in ({}, {"image": given["image"]}):
        with pytest.raises(ValueError, match="inpainting model, give both"):
            sampler(model, **wrong)
    with pytest.raises(ValueError, match="no inpainting model"):
        sampler(golden_model(), **given)


def test_without_attention_in_the_middle_a_layer_must_be_named(folders):
    model = load(str(folders("no_middle")))
    with pytest.raises(ValueError, match=r"no self-attention .*mid_block.*; it has: down_blocks.0"):
        sampler(model)
    name = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert samples(sampler(model, guidance=LatentGuidanceConfig(sag_block=name)), [0])[1] == 9
    assert samples(sampler(model, guidance=LatentGuidanceConfig(sag_scale=0)), [0])[1] == 6


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_nothing_stays_behind():
    model = golden_model()
    processors = dict(model.unet.attn_processors)
    condition, x_T = model.encode(["a cat"], *SIZE), noise(1, 8, 8)
    final(model.unet, model.scheduler, x_T, condition, [latent_guidance(model.unet, 0.75)])

    def fail(*_arguments):
        assert hooks(model.unet) == 3
        raise RuntimeError("boom")

    handle = model.unet.conv_out.register_forward_hook(fail)
    states, _, _ = trajectory(model.unet, model.scheduler, x_T, condition, [latent_guidance(model.unet, 0.75)])
    with pytest.raises(RuntimeError, match="boom"):
        next(states)
    handle.remove()
    assert hooks(model.unet) == 0
    assert model.unet.attn_processors == processors


class Listening(torch.nn.Module):
    """The golden UNet, keeping what it is given."""

    def __init__(self):
        super().__init__()
        self.unet = golden_model().unet
        self.dtype = torch.float32
        self.calls = []

    def forward(self, x, timesteps, **arguments):
        self.calls.append((x, timesteps, arguments))
        return self.unet(x, timesteps, **{key: arguments[key] for key in ("encoder_hidden_states", "return_dict")})


def test_arguments_of_lora_ip_adapter_and_controlnet_reach_every_pass():
    unet, model, seen = Listening(), golden_model(), []

    def controlnet(x, _timesteps, *, encoder_hidden_states, controlnet_cond, conditioning_scale, **_rest):
        seen.append((x, controlnet_cond, conditioning_scale))
        return (x * conditioning_scale,), encoder_hidden_states

    picture = noise(1, 64, 64)
    condition = model.encode(["a cat"], *SIZE) | {
        "cross_attention_kwargs": {"scale": 0.3},
        "added_cond_kwargs": {"image_embeds": [torch.ones(1, 1, 16)]},
        "control": {"controlnet_cond": picture, "conditioning_scale": 0.5},
    }
    null = condition | model.encode([""], *SIZE) | {"added_cond_kwargs": {"image_embeds": [torch.zeros(1, 1, 16)]}}
    by_prompt = ClassifierFreeGuidance(scale=6.5, null=lambda _condition: null)
    guidances = [by_prompt, latent_guidance(golden_model().unet, 0.75)]
    states, _, _ = trajectory(
        unet, golden_scheduler("eps"), noise(1, 8, 8), condition, guidances, controlnet=controlnet
    )
    next(states)
    assert [len(x) for x, _, _ in unet.calls] == [2, 1]
    for (x, _, arguments), (controlled, shown, scale), images in zip(
        unet.calls, seen, ([1.0, 0.0], [0.0]), strict=True
    ):
        assert arguments["cross_attention_kwargs"] == {"scale": 0.3}
        assert arguments["added_cond_kwargs"]["image_embeds"][0][:, 0, 0].tolist() == images
        assert torch.equal(controlled, x)
        assert torch.equal(shown, picture.expand(len(x), -1, -1, -1))
        assert scale == 0.5
        assert torch.equal(arguments["down_block_additional_residuals"][0], 0.5 * x)
        assert torch.equal(arguments["mid_block_additional_residual"], arguments["encoder_hidden_states"])


def test_a_controlnet_of_diffusers():
    model = golden_model()
    controlnet = latents.diffusers().ControlNetModel.from_unet(model.unet, conditioning_channels=3)
    latents.randomised(controlnet)
    condition, x_T = model.encode(["a cat"], *SIZE), noise(1, 8, 8)
    control = {"control": {"controlnet_cond": noise(1, 64, 64)[:, :3], "conditioning_scale": 0.5}}
    sag = [latent_guidance(model.unet, 0.75)]
    plain = final(model.unet, model.scheduler, x_T, condition, sag)
    controlled = final(model.unet, model.scheduler, x_T, condition | control, sag, controlnet=controlnet)
    assert controlled.isfinite().all()
    assert (controlled - plain).abs().max() > 0.1


def test_both_passes_are_scaled_as_the_scheduler_wants():
    unet, model = Listening(), golden_model()
    scheduler = choose_scheduler(model.scheduler, "euler", "karras")
    sag = latent_guidance(golden_model().unet, 0.75)
    states, _, kept = trajectory(unet, scheduler, noise(1, 8, 8), model.encode(["a cat"], *SIZE), [sag])
    for _ in states:
        pass
    assert len(unet.calls) == len(kept.predictions) == 10
    for (x, timesteps, _), prediction in zip(unet.calls, kept.predictions, strict=True):
        sigma = prediction.process.at("sigmas", prediction.t, x)
        near(x, prediction.x_t / (sigma**2 + 1).sqrt(), 1e-5)
        assert torch.equal(timesteps, prediction.process.network_timesteps(prediction.t))


def test_weights_of_half_precision_files_are_found(tmp_path):
    latents.diffusers()
    model = golden_model()
    for name, part in (("unet", model.unet), ("vae", model.vae)):
        part.save_pretrained(tmp_path / name, variant="fp16")
    for name in ("text_encoder", "tokenizer", "scheduler"):
        (tmp_path / name).symlink_to(latents.DATA / "model" / name)
    (tmp_path / "model_index.json").write_text("{}")
    near(load(str(tmp_path)).unet.conv_in.weight, model.unet.conv_in.weight, 0)


def test_a_single_file(tmp_path):
    path = latents.single_file(tmp_path / "model.safetensors")
    model = load(str(path), config=str(latents.DATA / "model"))
    for part in ("unet", "vae"):
        wanted = getattr(golden_model(), part).state_dict()
        got = getattr(model, part).state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    near(
        model.encode(["a cat"], *SIZE)["encoder_hidden_states"],
        golden_model().encode(["a cat"], *SIZE)["encoder_hidden_states"],
        1e-6,
    )
    for wrong, said in [
        ({"path": str(path)}, "a folder of configurations goes with a single .safetensors file"),
        ({"path": str(latents.DATA / "model"), "config": "x"}, "a folder of configurations goes with a single"),
        ({"path": "nowhere.safetensors", "config": "x"}, "no such file 'nowhere.safetensors'"),
        ({"path": str(path), "config": "nowhere"}, "no such folder 'nowhere'"),
    ]:
        with pytest.raises(ValueError, match=said):
            load(**wrong)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(str(path), config=str(latents.DATA / "model"))


def damaged(folder, part):
    target = folder / part
    if target.suffix == ".safetensors":
        target.write_bytes(target.read_bytes()[:1000])
    elif target.name == "scheduler_config.json":
        target.write_text(json.dumps({"_class_name": "AutoPipelineForText2Image"}))
    elif target.is_dir():
        target.rename(folder / "elsewhere")
    else:
        target.write_text("{")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "unet: cannot be loaded"),
        ("text_encoder/model.safetensors", "text_encoder: cannot be loaded"),
        ("unet/config.json", "config.json: cannot be read"),
        ("scheduler/scheduler_config.json", "'AutoPipelineForText2Image' is no scheduler of diffusers"),
        ("vae", "has no 'vae'"),
        ("tokenizer", "has no 'tokenizer'"),
        ("model_index.json", "model_index.json: cannot be read"),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(tmp_path, part, said):
    folder = tmp_path / "model"
    shutil.copytree(latents.DATA / "model", folder)
    damaged(folder, part)
    with pytest.raises(ValueError, match=said) as error:
        load(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_pickles_are_not_read(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(latents.DATA / "model", folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load(str(folder))
