"""The guider in diffusers' modular SDXL pipeline gives what our own sampler gives."""

import pytest
import torch

import latents
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance
from guided_diffusion.stable_diffusion.model import load
from guided_diffusion.stable_diffusion.sampling import latent_guidance
from guided_diffusion.stable_diffusion.schedulers import choose_scheduler, noise_levels
from latents import noise

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

HEIGHT, WIDTH, STEPS = 64, 96, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    latents.diffusers()
    return load(str(latents.variant(tmp_path_factory.mktemp("models") / "xl", "xl")))


def pipeline(model, scheduler, guider):
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    pipe = StableDiffusionXLAutoBlocks().get_workflow("text2image").init_pipeline()
    (tokenizer, tokenizer_2), (encoder, encoder_2) = model.tokenizers, model.text_encoders
    pipe.update_components(
        unet=model.unet, vae=model.vae, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=encoder, text_encoder_2=encoder_2, guider=guider, force_zeros_for_empty_prompt=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "heun", "kdpm2"])
@pytest.mark.parametrize(
    ("scale", "sag_scale", "preset"), [(3, 0.75, "paper"), (1, 0.75, "diffusers"), (3, 0, "paper")]
)
def test_the_guider_gives_what_the_sampler_gives(model, name, kind, scale, sag_scale, preset):
    from guided_diffusion.stable_diffusion.guider import SelfAttentionGuider

    scheduler = choose_scheduler(latents.golden_scheduler(kind), name)
    guider = SelfAttentionGuider(scheduler=scheduler, guidance_scale=scale, sag_scale=sag_scale, preset=preset)
    x_T = noise(1, HEIGHT // 8, WIDTH // 8)
    made = pipeline(model, scheduler, guider)(
        prompt="a cat", height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, latents=x_T, output="latents",
        output_type="latent",
    )  # fmt: skip
    negative = model.encode_negative("", 1, HEIGHT, WIDTH)
    guidances = [ClassifierFreeGuidance(scale=scale - 1, null=lambda _condition: negative)]
    guidances += [latent_guidance(model.unet, sag_scale, preset)] if sag_scale else []
    condition = model.encode(["a cat"], HEIGHT, WIDTH)
    wanted = latents.final(model.unet, scheduler, x_T, condition, guidances, steps=STEPS)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)
    assert hooks(model.unet) == 0


def test_a_sampling_makes_its_noise_levels_once(model, monkeypatch):
    from guided_diffusion.stable_diffusion import guider as module

    made = []
    monkeypatch.setattr(module, "noise_levels", lambda scheduler: made.append(1) or noise_levels(scheduler))
    scheduler = choose_scheduler(latents.golden_scheduler("eps"), "ddim")  # has no step_index
    guider = module.SelfAttentionGuider(scheduler=scheduler)

    def sample(guider, steps):
        return pipeline(model, scheduler, guider)(
            prompt="a cat", num_inference_steps=steps, height=64, width=64, latents=noise(1, 8, 8), output="latents",
            output_type="latent",
        )  # fmt: skip

    sample(guider, 3)
    again = sample(guider, 2)
    assert len(made) == 2
    assert torch.equal(again, sample(module.SelfAttentionGuider(scheduler=scheduler), 2))


def test_start_and_stop_are_parts_of_the_network_calls(model):
    from guided_diffusion.stable_diffusion.guider import SelfAttentionGuider

    calls = []
    handle = model.unet.register_forward_pre_hook(lambda _unet, args: calls.append(len(args[0])))
    scheduler = choose_scheduler(latents.golden_scheduler("eps"), "ddim")
    for part, wanted in [({}, 12), ({"start": 0.5}, 8), ({"stop": 0.25}, 6)]:
        calls.clear()
        pipeline(model, scheduler, SelfAttentionGuider(scheduler=scheduler, **part))(
            prompt="a cat", height=64, width=64, num_inference_steps=4, output="latents", output_type="latent"
        )
        assert len(calls) == wanted
    handle.remove()
    assert SelfAttentionGuider(scheduler=scheduler, enabled=False).num_conditions == 1


def test_nothing_that_matters_stays_behind_after_an_exception(model):
    from guided_diffusion.stable_diffusion.guider import SelfAttentionGuider

    scheduler = choose_scheduler(latents.golden_scheduler("eps"), "ddim")
    guider = SelfAttentionGuider(scheduler=scheduler)
    calls, seen = [], []

    def fail(*_arguments):
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("boom")

    for fails_at in (1, 2, 3):
        calls.clear()
        handle = model.unet.conv_out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            pipeline(model, scheduler, guider)(prompt="a cat", num_inference_steps=2, height=64, width=64)
        handle.remove()
        condition = model.encode(["a cat"], 64, 64)
        given = noise(1, 8, 8)
        handle = model.unet.conv_in.register_forward_pre_hook(lambda _conv, args: seen.append(args[0]))
        model.unet(given, 500, **condition)
        handle.remove()
        assert torch.equal(seen[-1], given)
    guider.set_state(0, 2, torch.tensor(500))
    assert hooks(model.unet) == 0


def test_the_configuration_is_saved_without_the_scheduler(tmp_path):
    latents.diffusers()
    from guided_diffusion.stable_diffusion.guider import SelfAttentionGuider

    guider = SelfAttentionGuider(scheduler=latents.golden_scheduler("eps"), sag_scale=0.3, preset="diffusers")
    guider.save_pretrained(tmp_path)
    again = SelfAttentionGuider.from_pretrained(tmp_path)
    assert (again.sag_scale, again.preset) == (0.3, "diffusers")
    with pytest.raises(ValueError, match=r"guider\.scheduler = pipe\.scheduler"):
        again.set_state(0, 2, torch.tensor(1))
