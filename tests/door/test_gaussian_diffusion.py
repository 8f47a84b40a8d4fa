"""What clients of guided-diffusion do to its diffusion: override, patch, set and call by place; upstream's numbers.

tests/data/door/numbers.npz holds what guided-diffusion (at 22e0df8) made of the same cases: float32, on a CPU.
"""

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

import golden
from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import script_util
from guided_diffusion.guidance.base import Guidance
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.schedule import Schedule
from guided_diffusion.networks.attention import find_block, replace_attention
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

FLAGS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16",
    "num_heads": 2,
    "learn_sigma": True,
    "diffusion_steps": 100,
    "timestep_respacing": "5",
}
SHAPE = (2, 3, 32, 32)
NUMBERS = np.load(golden.DATA / "door" / "numbers.npz")
TABLES = [
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    network, _ = script_util.create_model_and_diffusion(**FLAGS)
    return golden.fill(network)


def diffusion_of(**methods):
    """The five respaced steps, in a client's subclass with these methods."""
    return type("Client", (SpacedDiffusion,), methods)(
        use_timesteps=space_timesteps(100, "5"),
        betas=gd.get_named_beta_schedule("linear", 100),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )


def sampled(diffusion, model, loop="p_sample_loop", **more):
    torch.manual_seed(3)
    with torch.no_grad():
        return getattr(diffusion, loop)(model, SHAPE, **more)


def gradient(x, t, **_condition):
    return 0.5 * torch.sin(x) * (1 + t.view(-1, 1, 1, 1).float() / 100)


def equal_to_upstream(case, ours):
    wanted = NUMBERS[case]
    assert np.abs(ours.numpy().astype(np.float64) - wanted).max() <= 2e-4 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_two_batches_under_one_seed(model, loop):
    """The second one shows that as many random numbers were drawn as upstream draws."""
    torch.manual_seed(3)
    with torch.no_grad():
        batches = [getattr(diffusion_of(), loop)(model, SHAPE) for _ in range(2)]
    equal_to_upstream(f"twice_{'ddim' if 'ddim' in loop else 'ddpm'}", torch.stack(batches))


def test_an_overridden_mean(model):
    def p_mean_variance(self, *arguments, **more):
        out = SpacedDiffusion.p_mean_variance(self, *arguments, **more)
        out["mean"] = 0.9 * out["mean"]
        return out

    equal_to_upstream("override_p_mean_variance", sampled(diffusion_of(p_mean_variance=p_mean_variance), model))


def test_an_overridden_prediction_of_x0_under_ddim(model):
    def p_mean_variance(self, *arguments, **more):
        out = SpacedDiffusion.p_mean_variance(self, *arguments, **more)
        out["pred_xstart"] = 0.9 * out["pred_xstart"]
        return out

    ours = sampled(diffusion_of(p_mean_variance=p_mean_variance), model, "ddim_sample_loop")
    equal_to_upstream("override_p_mean_variance_ddim", ours)


def test_an_overridden_condition_mean(model):
    def condition_mean(_self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        return p_mean_var["mean"].float() + 0.1 * cond_fn(x, t, **(model_kwargs or {}))

    diffusion = diffusion_of(condition_mean=condition_mean)
    equal_to_upstream("override_condition_mean", sampled(diffusion, model, cond_fn=gradient, model_kwargs={}))


def test_an_overridden_formula(model):
    def formula(self, x_t, t, eps):
        return SpacedDiffusion._predict_xstart_from_eps(self, x_t, t, eps).clamp(-0.5, 0.5)

    equal_to_upstream("override_predict_xstart", sampled(diffusion_of(_predict_xstart_from_eps=formula), model))


def test_a_patched_instance(model):
    diffusion = diffusion_of()
    p_sample = diffusion.p_sample

    def patched(*arguments, **more):
        out = p_sample(*arguments, **more)
        out["sample"] = out["sample"] + 0.01
        return out

    diffusion.p_sample = patched
    equal_to_upstream("patched_instance", sampled(diffusion, model))


def test_an_overridden_q_sample_in_losses(model):
    def q_sample(self, x_start, t, noise=None):
        return 0.5 * SpacedDiffusion.q_sample(self, x_start, t, noise=noise)

    x0 = torch.from_numpy(np.random.RandomState(5).uniform(-1, 1, SHAPE).astype(np.float32))
    torch.manual_seed(4)
    with torch.no_grad():
        loss = diffusion_of(q_sample=q_sample).training_losses(model, x0, torch.tensor([1, 3]))["loss"]
    equal_to_upstream("override_q_sample_in_losses", loss)


def test_a_patched_schedule(monkeypatch):
    monkeypatch.setattr(gd, "get_named_beta_schedule", lambda name, steps: np.linspace(1e-4, 1e-2, steps))
    equal_to_upstream("patched_schedule", torch.from_numpy(script_util.create_model_and_diffusion(**FLAGS)[1].betas))


def test_what_the_schedules_and_the_bound_are_made_of_may_be_patched(model, monkeypatch):
    """Names that the module has from others, and that its functions look up: as upstream, a patch of them acts."""
    x0, t = torch.zeros(SHAPE), torch.tensor([1, 3])
    before = diffusion_of()._vb_terms_bpd(model, x0, x0, t)["output"]
    cosine = gd.get_named_beta_schedule("cosine", 10)
    with monkeypatch.context() as patch:
        patch.setattr(gd, "normal_kl", lambda *_: torch.full(SHAPE, math.log(2)))
        patch.setattr(gd, "betas_for_alpha_bar", lambda steps, *_: np.full(steps, 0.25))
        assert diffusion_of()._vb_terms_bpd(model, x0, x0, t)["output"].tolist() == pytest.approx([1, 1])
        assert gd.get_named_beta_schedule("cosine", 10).tolist() == [0.25] * 10
    assert torch.equal(diffusion_of()._vb_terms_bpd(model, x0, x0, t)["output"], before)
    assert np.array_equal(gd.get_named_beta_schedule("cosine", 10), cosine)


def test_arguments_by_place():
    network = script_util.create_model(32, 32, 1, "1,2", True)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    numbers = torch.tensor([len(network.input_blocks), network.out[2].weight.shape[0], parameters])
    equal_to_upstream("positional_create_model", numbers)


def test_tables():
    diffusion = diffusion_of()
    equal_to_upstream("tables", torch.from_numpy(np.stack([getattr(diffusion, name) for name in TABLES])))


# Of upstream's methods, which each loop reaches.
REACHES = {
    "p_sample_loop": "p_sample_loop_progressive p_sample p_mean_variance _predict_xstart_from_eps "
    "q_posterior_mean_variance condition_mean _wrap_model",
    "ddim_sample_loop": "ddim_sample_loop_progressive ddim_sample p_mean_variance condition_score "
    "_predict_eps_from_xstart _predict_xstart_from_eps q_posterior_mean_variance",
    "training_losses": "q_sample _vb_terms_bpd p_mean_variance q_posterior_mean_variance _scale_timesteps",
    "calc_bpd_loop": "_vb_terms_bpd q_sample _prior_bpd p_mean_variance q_mean_variance _predict_eps_from_xstart",
    "ddim_reverse_sample": "p_mean_variance _predict_eps_from_xstart",
}
PAIRS = [(loop, method) for loop, methods in REACHES.items() for method in methods.split()]


def called(loop, diffusion):
    """Run a loop of a network that answers at once."""

    def network(x, _t, **_condition):
        return torch.cat([0.1 * x, 0 * x], dim=1)

    x, t = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8), torch.tensor([3, 1])
    if loop.endswith("sample_loop"):
        return getattr(diffusion, loop)(network, x.shape, noise=x, cond_fn=gradient)
    if loop == "calc_bpd_loop":
        return diffusion.calc_bpd_loop(network, x)
    return getattr(diffusion, loop)(network, x, t)


@pytest.mark.parametrize(("loop", "method"), PAIRS)
@pytest.mark.parametrize("patched", [False, True], ids=["subclass", "instance"])
def test_every_loop_reaches_what_a_client_overrides(loop, method, patched):
    seen = []

    def of_client(self, *arguments, **more):
        seen.append(method)
        return getattr(SpacedDiffusion, method)(self, *arguments, **more)

    if patched:
        diffusion = diffusion_of()
        setattr(diffusion, method, partial(of_client, diffusion))
    else:
        diffusion = diffusion_of(**{method: of_client})
    called(loop, diffusion)
    assert seen


@pytest.mark.parametrize("kind", ["EPSILON", "START_X", "PREVIOUS_X"])
def test_overrides_of_other_mean_types(kind):
    seen = []

    def formula(self, x_t, t, xprev):
        seen.append(kind)
        return SpacedDiffusion._predict_xstart_from_xprev(self, x_t, t, xprev)

    diffusion = diffusion_of(_predict_xstart_from_xprev=formula)
    diffusion.model_mean_type = gd.ModelMeanType[kind]
    called("p_sample_loop", diffusion)
    assert bool(seen) == (kind == "PREVIOUS_X")


KEYS = ("sample", "pred_xstart")


class Constant(Guidance):
    """Δ = the same number everywhere."""

    def difference(self, step):
        return torch.ones_like(step.base.x_t)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_an_override_and_a_guidance_compose(loop, in_place):
    """A client's pred_xstart or mean stays as the client made it, and guidance moves it by what guidance moves."""
    network = lambda x, t, **_condition: torch.cat([0.1 * x, 0 * x], dim=1)  # noqa: E731
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    guidance = Constant(scale=0.3)

    def p_mean_variance(self, *arguments, **more):
        out = SpacedDiffusion.p_mean_variance(self, *arguments, **more)
        if in_place:
            out["mean"] += 0.25
            out["pred_xstart"] -= 0.5
            return out
        return {**out, "mean": out["mean"] + 0.25, "pred_xstart": out["pred_xstart"] - 0.5}

    def one_step(diffusion, guidance):
        step = diffusion.p_sample if loop == "p_sample_loop" else diffusion.ddim_sample
        t = torch.tensor([2, 2])
        return step(network, x, t, clip_denoised=False, guidance=guidance, noise=torch.zeros_like(x))

    plain, mine = diffusion_of(), diffusion_of(p_mean_variance=p_mean_variance)
    by_guidance = {
        key: one_step(plain, guidance)[key] - one_step(plain, None)[key] for key in ("sample", "pred_xstart")
    }
    for key, moved in by_guidance.items():
        assert moved.abs().max() > 0.01
        torch.testing.assert_close(
            one_step(mine, guidance)[key] - one_step(mine, None)[key], moved, atol=1e-5, rtol=1e-5
        )
    assert (one_step(mine, None)["pred_xstart"] - one_step(plain, None)["pred_xstart"]).mean() == pytest.approx(-0.5)


def test_a_step_that_takes_no_guidance_is_refused_by_name():
    def p_sample(_self, _model, x, _t, clip_denoised, denoised_fn, cond_fn, model_kwargs):  # noqa: ARG001
        return {"sample": x, "pred_xstart": x}

    diffusion, network = diffusion_of(p_sample=p_sample), lambda x, t: torch.cat([x, x], dim=1)
    noise = torch.zeros(1, 3, 8, 8)
    assert torch.equal(diffusion.p_sample_loop(network, noise.shape, noise=noise), noise)
    with pytest.raises(TypeError, match=r"p_sample takes no `guidance`"):
        diffusion.p_sample_loop(network, noise.shape, noise=noise, guidance=Constant(scale=1))


def test_tables_may_be_set():
    diffusion = diffusion_of()
    x, t = torch.ones(1, 3, 8, 8), torch.tensor([2])
    diffusion.q_sample(x, t)
    diffusion.sqrt_alphas_cumprod = 2 * diffusion.sqrt_alphas_cumprod
    torch.testing.assert_close(diffusion.q_sample(x, t, 0 * x), x * float(diffusion.sqrt_alphas_cumprod[2]))
    diffusion.num_timesteps = 3
    network = lambda x, t: torch.cat([x, x], dim=1)  # noqa: E731
    assert len(list(diffusion.p_sample_loop_progressive(network, x.shape, noise=x))) == 3
    assert diffusion.use_timesteps == space_timesteps(100, "5")
    with pytest.raises(AttributeError, match="no attribute 'sqrt_betas'"):
        _ = diffusion.sqrt_betas


def test_a_loop_may_begin_in_the_middle():
    diffusion = diffusion_of()
    image, noise = torch.full((1, 3, 8, 8), 0.5), torch.randn(1, 3, 8, 8)
    seen = []

    def network(x, t):
        seen.append((x, int(t[0])))
        return torch.cat([x, x], dim=1)

    diffusion.p_sample_loop(network, image.shape, noise=noise, skip_timesteps=2, init_image=image)
    assert [t for _, t in seen] == diffusion.timestep_map[2::-1]
    torch.testing.assert_close(seen[0][0], diffusion.q_sample(image, torch.tensor([2]), noise))

    in_other_order = torch.rand(1, 8, 8, 3).permute(0, 3, 1, 2)
    samples = []
    for first in (in_other_order, in_other_order.contiguous()):
        torch.manual_seed(0)
        samples.append(diffusion.p_sample_loop(network, image.shape, noise=noise, skip_timesteps=2, init_image=first))
    assert torch.equal(*samples)

    with pytest.raises(ValueError, match="skip_timesteps: wanted 0 to 4, got 5"):
        diffusion.p_sample_loop(network, image.shape, noise=noise, skip_timesteps=5)


def test_inversion_comes_back_better_with_more_steps():
    """ε of data that is normal with variance v is known; there and back is the image, but for the steps' error."""
    v, image = 0.5, torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    errors = []
    for steps in (25, 100, 250):
        diffusion = script_util.create_gaussian_diffusion(timestep_respacing=str(steps))
        process = diffusion.process

        def network(x, t, process=process):
            alpha_bar = torch.tensor(process.alphas_cumprod, dtype=torch.float32)[process.timestep_map.index(int(t[0]))]
            return x * (1 - alpha_bar).sqrt() / (alpha_bar * v + 1 - alpha_bar)

        skip = steps // 10
        x = diffusion.ddim_reverse_sample_loop(
            network, image, clip_denoised=False, device=image.device, skip_timesteps=skip
        )
        steps_back = range(steps - 1 - skip, -1, -1)
        for number in steps_back:
            x = diffusion.ddim_sample(network, x, torch.tensor([number]), clip_denoised=False)["sample"]
        errors.append(float((x - image).square().mean().sqrt()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_the_authors_guidance_kwargs(model):
    """`sel_attn_…` of the network's builder and `guidance_kwargs` of the loops are the authors' guidance."""
    flags = FLAGS | {"sel_attn_block": "output", "sel_attn_depth": 1}
    own, diffusion = script_util.create_model_and_diffusion(**flags)
    kwargs = {"guide_start": 3, "guide_scale": 1.5, "blur_sigma": 2}
    guidance = script_util.create_guidance(
        model, sel_attn_block="output", sel_attn_depth=1, fidelity="reference", **kwargs
    )
    theirs = sampled(diffusion, model, guidance_kwargs=kwargs)
    assert torch.equal(theirs, sampled(diffusion, model, guidance=guidance))
    assert not torch.equal(theirs, sampled(diffusion, model))

    own.load_state_dict(model.state_dict())
    by_function = sampled(diffusion, lambda x, t, y=None: own.eval()(x, t), guidance_kwargs=kwargs, device="cpu")
    assert torch.equal(theirs, by_function)


def test_the_pag_authors_guidance_strategies(model):
    """Their network perturbs itself when it is told to; here it is the same as our guidance at the same steps."""
    block = find_block(model, "middle_block.1")
    diffusion = diffusion_of()

    def perturbing(x, t, perturb=None):
        assert perturb in (None, "attention_mask_identity")
        with replace_attention(block, fn=lambda q, k, v: v) if perturb else nullcontext():
            return model(x, t)

    kwargs = {"guide_scale": 1.8, "guide_schedule": None, "blur_sigma": 3}
    kwargs["guidance_strategies"] = {"attention_mask_identity": [3, 1]}
    guidance = PerturbedAttentionGuidance(scale=0.8, blocks=(block,), schedule=Schedule(0.2, 0.8))
    theirs = sampled(diffusion, perturbing, guidance_kwargs=kwargs, device="cpu")
    torch.testing.assert_close(theirs, sampled(diffusion, model, guidance=guidance), atol=1e-5, rtol=1e-5)
    assert not torch.equal(theirs, sampled(diffusion, model))
    with pytest.raises(ValueError, match="guidance_kwargs: drop_rate: wanted guide_start, guide_scale, blur_sigma"):
        diffusion.p_sample_loop(model, SHAPE, guidance_kwargs={"drop_rate": 1})


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("UNetModel", lambda: script_util.create_model_and_diffusion(**FLAGS)),
        ("create_model", lambda: script_util.create_model_and_diffusion(**FLAGS)),
        ("create_gaussian_diffusion", lambda: script_util.create_model_and_diffusion(**FLAGS)),
        ("SpacedDiffusion", lambda: script_util.create_gaussian_diffusion()),
        ("space_timesteps", lambda: script_util.create_gaussian_diffusion()),
        ("EncoderUNetModel", lambda: script_util.create_classifier_and_diffusion(classifier_width=64)),
        ("create_classifier", lambda: script_util.create_classifier_and_diffusion(classifier_width=64)),
        ("SuperResModel", lambda: script_util.sr_create_model_and_diffusion(64, 16, num_channels=32)),
        ("sr_create_model", lambda: script_util.sr_create_model_and_diffusion(64, 16, num_channels=32)),
    ],
)
def test_what_a_builder_uses_may_be_replaced(monkeypatch, name, builder):
    seen, original = [], getattr(script_util, name)

    def mine(*arguments, **more):
        seen.append(name)
        return original(*arguments, **more)

    monkeypatch.setattr(script_util, name, mine)
    builder()
    assert seen


def test_all_steps_are_kept_where_no_respacing_is_given():
    for respacing in (None, "", [100]):
        flags = FLAGS | {"timestep_respacing": respacing}
        assert script_util.create_model_and_diffusion(**flags)[1].num_timesteps == 100


def test_another_number_of_classes_for_all_networks(monkeypatch):
    monkeypatch.setattr(script_util, "NUM_CLASSES", 7)
    network, _ = script_util.create_model_and_diffusion(**FLAGS, class_cond=True)
    assert network.label_emb.weight.shape[0] == 7
    assert script_util.create_classifier(classifier_width=64).out[-1].c_proj.weight.shape[0] == 7
