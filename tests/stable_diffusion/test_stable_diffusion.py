"""Stable Diffusion against the public pipeline's numbers, and as mathematics with every scheduler."""

import pytest
import torch
from safetensors.torch import load_file

import latents
from guided_diffusion.diffusion.denoiser import Prediction
from guided_diffusion.guidance.blur import gaussian_blur
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance
from guided_diffusion.networks.attention import record_attention
from guided_diffusion.stable_diffusion.attention import MIDDLE, find_layer, self_attention_layers
from guided_diffusion.stable_diffusion.sampling import latent_guidance
from guided_diffusion.stable_diffusion.schedulers import (
    SCHEDULERS,
    calls,
    choose_scheduler,
    diffuse,
    mean_type,
    noise_levels,
    start,
)
from latents import final, golden_model, golden_scheduler, noise, trajectory

# numpy's about tensors, in diffusers' Heun and KDPM2.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIZE = 64, 64
STOCHASTIC = {"ddpm", "dpm++_sde", "euler_a", "lcm"}


@pytest.fixture(scope="module", autouse=True)
def extra():
    latents.diffusers()


def near(got, wanted, tolerance=1e-4):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def combinations():
    """Every scheduler, with its own spacing and with every one it has and steps by."""
    pairs = []
    for name, (kind, _) in SCHEDULERS.items():
        sigmas = kind not in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler") and name != "euler_a"
        steps = name != "dpm++_single"
        pairs += [(name, "")]
        pairs += [(name, spacing) for spacing in ("leading", "trailing") if steps]
        pairs += [(name, "linspace")] if steps and name not in ("ddim", "pndm") else []
        pairs += [(name, spacing) for spacing in ("karras", "exponential") if sigmas]
    return pairs


def prompt_guidance(scale, negative):
    return ClassifierFreeGuidance(scale=scale - 1, null=lambda _condition: negative)


@pytest.mark.parametrize("name", latents.CASES)
def test_golden(name):
    case, wanted = latents.golden_case(name)
    model, scheduler = golden_model(), golden_scheduler(name.partition("_")[0])
    size = 8 * case["latent_height"], 8 * case["latent_width"]
    condition = model.encode(case["prompts"], *size)
    near(condition["encoder_hidden_states"], wanted["prompt_embeds"], 1e-6)
    guidances, sag, scale = [], None, case["guidance_scale"]
    if scale != 1:
        negative = model.encode(case["negative_prompts"], *size)
        near(negative["encoder_hidden_states"], wanted["negative_prompt_embeds"], 1e-6)
        guidances.append(prompt_guidance(scale, negative))
    if case["sag_scale"]:
        sag = latent_guidance(model.unet, case["sag_scale"], preset="diffusers")
        guidances.append(sag)
    states, guided, kept = trajectory(model.unet, scheduler, wanted["latents_init"], condition, guidances)
    rows, heads = case["batch"], 2
    for i, state in enumerate(states):
        step, calls = guided.last_step, kept.predictions
        near(state.prediction.x_t, wanted["latents_in"][i])
        near(step.base.output, wanted["model_out" if scale == 1 else "model_out_uncond"][i])
        if scale != 1:
            near(step.conditional.output, wanted["model_out_cond"][i])
        if sag:
            mask = sag.mask(step)
            assert torch.equal(mask, wanted["mask"][i][:, None].bool())
            attention = wanted["attn"][i].unflatten(0, (rows, heads))
            score = step.recorded[sag][sag.block]
            assert list(score.shape) == [rows, *case["map_size"]]
            near(score.flatten(1), attention.mean(dim=1).sum(dim=1))
            near(step.base.raw_x0, wanted["pred_x0"][i])
            near(sag.degrade(step.base, mask), wanted["degraded_latents"][i])
            near(calls[-1].x_t, wanted["degraded_latents"][i])
            near(calls[-1].output, wanted["model_out_degraded"][i])
            if "blurred_x0" in wanted:
                near(sag.blurred(step.base), wanted["blurred_x0"][i])
        near(state.prediction.output, wanted["guided"][i])
        evaluations = 1 + (scale != 1) + bool(sag)
        assert step.evaluations == evaluations
        assert sum(len(call.x_t) for call in calls) == (i + 1) * rows * evaluations
        assert len(calls) == (i + 1) * (1 + bool(sag))
    assert i == case["steps"] - 1
    near(state.x, wanted["latents_final"], 2e-4)


def test_golden_decode():
    wanted = load_file(latents.DATA / "decode.safetensors")
    near(golden_model().decode(wanted["latents"]), wanted["image"])


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize(("name", "spacing"), combinations())
def test_without_blur_guidance_is_the_identity(name, spacing, kind):
    model, scheduler = golden_model(), choose_scheduler(golden_scheduler(kind), name, spacing)
    condition, x_T = model.encode(["a cat"], *SIZE), noise(1, 8, 8)
    plain = final(model.unet, scheduler, x_T, condition, steps=3)
    guided = final(model.unet, scheduler, x_T, condition, [latent_guidance(model.unet, 0.75, blur_sigma=0.0)], steps=3)
    assert plain.isfinite().all()
    near(guided, plain, 1e-5 * max(1.0, plain.abs().max().item()))


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_runs_with_every_scheduler(name, kind):
    model, scheduler = golden_model(), choose_scheduler(golden_scheduler(kind), name)
    condition, x_T = model.encode(["a cat"], *SIZE), noise(1, 8, 8)
    states, guided, kept = trajectory(
        model.unet, scheduler, x_T, condition, [latent_guidance(model.unet, 0.75)], steps=3
    )
    for state in states:
        assert state.x.isfinite().all()
    assert guided.evaluations == len(kept.predictions)
    assert guided.evaluations == 2 * {"heun": 5, "kdpm2": 5, "pndm": 4}.get(name, 3)
    assert (state.x - final(model.unet, scheduler, x_T, condition, steps=3)).abs().max() > 1e-2


def averages_outputs(name, kind):
    """PNDM averages what the network put out at different noise levels: only of ε that is the same thing."""
    return name == "pndm" and kind == "v"


@pytest.mark.parametrize("made", [5, 3])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize(("name", "spacing"), [pair for pair in combinations() if pair[0] not in STOCHASTIC])
def test_a_perfect_network_stays_on_its_straight_line(name, spacing, kind, made):
    """x̂_0 always the same: x_t = α_t x_0 + σ_t ε with one ε, so levels and parametrisation are the scheduler's.

    Also where it begins in the middle, with x_0 under noise, and then that very noise is the ε.
    """
    if averages_outputs(name, kind):
        pytest.skip("diffusers' PNDM averages v of different noise levels")
    scheduler = start(choose_scheduler(golden_scheduler(kind), name, spacing), 5, made=made)
    left = len(calls(scheduler))
    levels, x0, seen = noise_levels(scheduler).first(left), noise(1, 8, 8, seed=5), []
    assert left == {"heun": 2 * made - 1, "kdpm2": 2 * made - 1, "pndm": made + 1}.get(name, made)

    def perfect(x_t, t, condition):
        seen.append(levels.eps_from_x0(x_t, t, x0))
        return Prediction(levels, x_t, t, condition, seen[-1], x0, predicts=mean_type(scheduler))

    x_T, image = noise(1, 8, 8), None if made == 5 else x0
    for state in diffuse(scheduler, perfect, x_T, {}, [], image):
        pass
    assert len(seen) == left
    for eps in seen:
        near(eps, seen[0] if image is None else x_T, 1e-3)
    # Some schedulers end at a noise level of 0.03, not 0.
    assert (state.x - x0).abs().max() < 0.2


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize(("name", "spacing"), combinations())
def test_the_noise_in_the_latents_is_what_the_network_is_told(name, spacing, steps):
    """x̂_0 always 0: at every call, x_t is noise alone, and its standard deviation must be σ_t."""
    scheduler = start(choose_scheduler(golden_scheduler("eps"), name, spacing), steps)
    levels, ratios = noise_levels(scheduler).first(len(calls(scheduler))), []

    def nothing(x_t, t, condition):
        ratios.append((x_t.std() / levels.at("sigmas", t, x_t).flatten()[0]).item())
        x0 = torch.zeros_like(x_t)
        return Prediction(levels, x_t, t, condition, levels.eps_from_x0(x_t, t, x0), x0, predicts=mean_type(scheduler))

    x_T = noise(1, 64, 64)
    for _ in diffuse(scheduler, nothing, x_T / x_T.std(), {}, [torch.Generator().manual_seed(1)]):
        pass
    # Leading spacing begins with all noise where there should be a little less.
    assert ratios[0] == pytest.approx(1, abs=0.03)
    assert ratios == pytest.approx([ratios[0]] * len(ratios), abs=0.04 if name in STOCHASTIC else 1e-3)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_steps_of_another_length_than_the_spacings_are_refused(name):
    own = golden_scheduler("eps")
    for scheduler, spacing in [(own, "linspace"), (type(own).from_config(own.config, timestep_spacing="linspace"), "")]:
        with pytest.raises(ValueError, match="makes steps of another length than linspace has; give --spacing leading"):
            choose_scheduler(scheduler, name, spacing)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("EDMEulerScheduler", "preconditions"),
        ("EDMDPMSolverMultistepScheduler", "preconditions"),
        ("FlowMatchEulerDiscreteScheduler", "is none of diffusion of ε, x_0 or v"),
        ("FlowMatchHeunDiscreteScheduler", "is none of diffusion of ε, x_0 or v"),
        ("IPNDMScheduler", "is none of diffusion of ε, x_0 or v"),
        ("DDIMInverseScheduler", "is none of diffusion of ε, x_0 or v"),
        ("DPMSolverMultistepInverseScheduler", "makes noise of images"),
    ],
)
def test_models_of_other_kinds_are_refused(name, said):
    """Also where another class is asked for, which would read the same network as one of ε."""
    own = getattr(latents.diffusers(), name).from_config({})
    with pytest.raises(ValueError, match=f"scheduler: {name} {said}"):
        choose_scheduler(own)
    if name != "DPMSolverMultistepInverseScheduler":
        with pytest.raises(ValueError, match=f"scheduler: {name} {said}"):
            choose_scheduler(own, "euler")


def test_networks_that_predict_a_flow_are_refused():
    flow = choose_scheduler(golden_scheduler("eps"), "dpm++")
    with pytest.raises(ValueError, match="wanted epsilon, sample, v_prediction, got 'flow_prediction'"):
        mean_type(type(flow).from_config(flow.config, prediction_type="flow_prediction"))


@pytest.mark.parametrize(
    ("name", "spacing", "steps", "said"),
    [
        ("ddim", "leading", 1000, "begins 1000 steps at timestep 1000, of 0 to 999, .*; give --spacing trailing"),
        ("pndm", "leading", 1000, "begins 1000 steps at timestep 1000, of 0 to 999, .*; give --spacing trailing"),
        ("ddim", "leading", 1, "begins 1 steps at timestep 1, of 0 to 999, .*; give --spacing trailing"),
        ("euler", "linspace", 1, "begins 1 steps at timestep 0, of 0 to 999, .*; give --spacing trailing"),
        *((name, "", 1001, "cannot make 1001 steps: its network was trained on 1000") for name in SCHEDULERS),
    ],
)
def test_steps_that_there_are_not_are_refused(name, spacing, steps, said):
    with pytest.raises(ValueError, match=said):
        start(choose_scheduler(golden_scheduler("eps"), name, spacing), steps)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm"])
def test_every_trained_step_can_be_made(name):
    levels = noise_levels(start(choose_scheduler(golden_scheduler("eps"), name, "trailing"), 1000))
    assert sorted(set(levels.timesteps.tolist())) == list(range(1000))


def test_a_spacing_replaces_the_models_own():
    model = golden_model()
    own = choose_scheduler(model.scheduler, "euler", "karras")
    for spacing, flags in [("exponential", (False, True)), ("trailing", (False, False)), ("", (True, False))]:
        config = choose_scheduler(own, "dpm++", spacing).config
        assert (config.use_karras_sigmas, config.use_exponential_sigmas) == flags
    ancestral = latents.diffusers().KDPM2AncestralDiscreteScheduler.from_config(model.scheduler.config)
    with pytest.raises(ValueError, match="another noise level than it steps by"):
        choose_scheduler(ancestral)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_noise_of_a_sample_is_its_own(name):
    model, scheduler = golden_model(), choose_scheduler(golden_scheduler("v"), name)
    condition, x_T = model.encode(["a cat"] * 2, *SIZE), noise(1, 8, 8).repeat(2, 1, 1, 1)

    def run(seeds):
        started = start(scheduler, 3)
        denoiser = latents.NetworkDenoiser(
            latents.LatentNetwork(model.unet, started), noise_levels(started), mean_type(started), None, False
        )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for state in diffuse(started, denoiser, x_T, condition, generators):
            pass
        return state.x

    one, two = run([1, 2])
    near(run([2, 1]), torch.stack([two, one]), 1e-5)
    assert (one - two).abs().max() > 0.1


def test_eps_and_model_space_are_one_rule_for_eps_and_two_for_v():
    model = golden_model()
    condition, x_T = model.encode(["a cat"], *SIZE), noise(1, 8, 8)
    for kind in ("eps", "v"):
        eps, output = (
            final(model.unet, golden_scheduler(kind), x_T, condition, [latent_guidance(model.unet, 0.75, space=space)])
            for space in ("eps", "model")
        )
        assert ((eps - output).abs().max() < 1e-5) == (kind == "eps")


def test_model_space_takes_the_difference_of_v():
    model = golden_model()
    condition, x_T = model.encode(["a cat"], *SIZE), noise(1, 8, 8)
    sag = latent_guidance(model.unet, 0.75, space="model")
    states, _, kept = trajectory(model.unet, golden_scheduler("v"), x_T, condition, [sag])
    prediction = next(states).prediction
    v, degraded = (call.output for call in kept.predictions)
    near(prediction.output, v + 0.75 * (v - degraded), 1e-5)
    paper = trajectory(model.unet, golden_scheduler("v"), x_T, condition, [latent_guidance(model.unet, 0.75)])
    near(next(paper[0]).prediction.eps, 1.75 * kept.predictions[0].eps - 0.75 * kept.predictions[1].eps, 1e-5)


def test_every_layer_by_name():
    model = golden_model()
    layers = self_attention_layers(model.unet)
    assert len(layers) == 7
    condition = model.encode(["a cat"] * 2, *SIZE)
    with record_attention(*layers.values()) as scores:
        model.unet(noise(2, 10, 13), 500, **condition)
    # Strides of 2 round up: no factor leads from 10×13 to 3×4.
    sides = {"mid_block": (3, 4), "down_blocks.0": (10, 13), "down_blocks.1": (5, 7), "up_blocks.1": (5, 7)}
    for name, layer in layers.items():
        part = name.partition(".attentions")[0]
        assert scores[layer].shape == (2, *sides.get(part, (10, 13)))
        near(scores[layer].mean(dim=(1, 2)), torch.ones(2), 1e-5)
        assert scores[layer].dtype is torch.float32
    assert find_layer(model.unet, "mid_block.attentions[0].transformer_blocks[0].attn1").layer is layers[MIDDLE].layer


def test_odd_sizes():
    model = golden_model()
    for height, width in ((9, 13), (5, 21), (8, 11)):
        condition, x_T = model.encode(["a cat"], 8 * height, 8 * width), noise(1, height, width)
        sag = latent_guidance(model.unet, 0.75)
        states, guided, kept = trajectory(model.unet, model.scheduler, x_T, condition, [sag], steps=2)
        for state in states:
            mask = sag.mask(guided.last_step)
            assert mask.shape == (1, 1, height, width)
            degraded, base = kept.predictions[-1].x_t, guided.last_step.base
            outside = ~mask.expand_as(base.x_t)
            assert torch.equal(degraded[outside], base.x_t[outside])
            blurred = base.process.q_sample(gaussian_blur(base.raw_x0, 1.0, 9), base.t, base.eps)
            assert torch.equal(degraded[~outside], blurred[~outside])
        assert state.x.shape == (1, 4, height, width)


def test_half_precision_on_a_cpu():
    model = latents.load(str(latents.DATA / "model"), torch.bfloat16)
    assert model.unet.dtype is torch.bfloat16
    condition, x_T = model.encode(["a cat"], *SIZE), noise(1, 8, 8)
    sag = latent_guidance(model.unet, 0.75)
    states, guided, _ = trajectory(model.unet, golden_scheduler("v"), x_T, condition, [sag])
    for state in states:
        score = guided.last_step.recorded[sag][sag.block]
        assert score.dtype is torch.float32
        near(score.mean(dim=(1, 2)), torch.ones(1), 1e-5)
        assert state.x.dtype is torch.float32
    full = golden_model()
    wanted = final(full.unet, golden_scheduler("v"), x_T, full.encode(["a cat"], *SIZE))
    plain = final(model.unet, golden_scheduler("v"), x_T, condition)
    assert (plain - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert model.decode(state.x).dtype is torch.float32
