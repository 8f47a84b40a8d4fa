"""What users of the API get wrong is said in a sentence, or works."""

import copy
import logging

import pytest
import torch
from torch import nn

from guided_diffusion import gaussian_diffusion
from guided_diffusion.guidance.classifier import ClassifierGradient
from guided_diffusion.script_util import create_model_and_diffusion
from small import SMALL, randomised

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([1, 1]), torch.tensor([0, 3])
KWARGS = {"y": Y}


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(
        **SMALL | {"timestep_respacing": "3"}, class_cond=True, num_classes=4
    )
    return randomised(network), diffusion


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (X[:, :1], Y, r"x: wanted 3 channels, got \[2, 1, 16, 16\]"),
        (X[:, :, :15], Y, r"x: wanted sides that are multiples of 2 \(one half a level\), got \[15, 16\]"),
        (X, Y.float(), "y: wanted labels of an integer dtype, got torch.float32"),
        (X, Y + 1, r"y: wanted labels from 0 to 3, got \[1, 4\]"),
        (X, Y - 1, r"y: wanted labels from 0 to 3, got \[-1, 2\]"),
        (X, None, "labels y go with a class-conditional network"),
    ],
)
def test_what_a_network_does_not_take(made, x, y, said):
    with pytest.raises(ValueError, match=said):
        made[0](x, T, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_that_was_converted_whole(made, dtype):
    network = copy.deepcopy(made[0]).to(dtype)
    with pytest.raises(ValueError, match=r"was converted whole: network\.float\(\), then convert_to_fp16"):
        made[1].p_sample_loop(network, X.shape, noise=X, model_kwargs=KWARGS)
    network.float().convert_to(torch.bfloat16)
    assert network(X, T, Y).isfinite().all()


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_cond_fn_without_a_return(made, loop):
    with pytest.raises(ValueError, match=r"cond_fn: wanted a gradient of the shape \[2, 3, 16, 16\], got None"):
        getattr(made[1], loop)(made[0], X.shape, model_kwargs=KWARGS, cond_fn=lambda x, t, y: None)


class Classifier(nn.Module):
    """As far as the logits of a class are concerned, the mean of a channel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))

    def forward(self, x, _timesteps):
        return x.mean(dim=(2, 3)) @ self.weight


def upstream_cond_fn(x, t, y):
    """As guided-diffusion's scripts write it."""
    with torch.enable_grad():
        x_in = x.detach().requires_grad_(True)
        log_probs = torch.log_softmax(Classifier()(x_in, t), dim=-1)
        return torch.autograd.grad(log_probs[range(len(log_probs)), y.view(-1)].sum(), x_in)[0] * 50


@pytest.mark.parametrize("cond_fn", [ClassifierGradient(Classifier(), 50.0), upstream_cond_fn])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_classifier_guides_also_in_inference_mode(made, loop, cond_fn):
    network, diffusion = made

    def run(**more):
        torch.manual_seed(0)
        return getattr(diffusion, loop)(network, X.shape, noise=X, model_kwargs={"y": Y.clone()}, **more)

    wanted = run(cond_fn=cond_fn)
    with torch.inference_mode():
        got = run(cond_fn=cond_fn)
    assert torch.equal(got, wanted)
    assert (wanted - run()).abs().max() > 1e-3


def test_dropout_at_work_while_sampling_is_said_once(made, caplog):
    gaussian_diffusion._say_dropout.cache_clear()
    network, diffusion = create_model_and_diffusion(**SMALL | {"timestep_respacing": "2"}, dropout=0.5)
    with caplog.at_level(logging.WARNING):
        diffusion.p_sample_loop(network.eval(), X.shape)
        made[1].p_sample_loop(made[0].train(), X.shape, model_kwargs=KWARGS)
        made[0].eval()
        assert not caplog.text
        for _ in range(2):
            diffusion.ddim_sample_loop(network.train(), X.shape)
    assert caplog.text.count("the network is in training mode, call .eval()") == 1
