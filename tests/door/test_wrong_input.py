"""What users of the API get wrong first is one sentence, or is made right."""

import copy
import warnings

import pytest
import torch

from guided_diffusion.diffusion.samplers import ddim
from guided_diffusion.guidance.classifier import ClassifierGradient, with_classifier
from guided_diffusion.networks.unet import EncoderUNetModel
from guided_diffusion.script_util import create_model_and_diffusion
from small import SMALL, randomised

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 3])
Y = torch.tensor([0, 1])


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return randomised(EncoderUNetModel(16, 3, 32, 4, 1, [2], channel_mult=(1, 2), num_head_channels=16))


def last(model, noise=X, y=Y, **more):
    network, diffusion = model
    return diffusion.ddim_sample_loop(network, noise.shape, noise=noise, model_kwargs={"y": y}, **more)


def none(_x, _t, **_condition):
    return None


def test_a_cond_fn_that_returns_nothing(small_conditional):
    network, diffusion = small_conditional
    said = "cond_fn: wanted ∇ log p.* a tensor of x's shape, got NoneType"
    with pytest.raises(ValueError, match=said):
        last(small_conditional, cond_fn=none)
    with pytest.raises(ValueError, match=said):
        diffusion.p_sample(network, X, T, cond_fn=none, model_kwargs={"y": Y})
    denoiser = with_classifier(diffusion.denoiser(network), none)
    with pytest.raises(ValueError, match=said):
        next(ddim(denoiser, diffusion.process, X, {"y": Y}))


def test_gradients_are_there_under_inference_mode(small_conditional, classifier):
    ours = ClassifierGradient(classifier.requires_grad_(True), 30.0)

    def upstreams(x, t, y):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = classifier(x_in, t).log_softmax(dim=-1)
            return torch.autograd.grad(log_probs[range(len(x)), y].sum(), x_in)[0] * 30.0

    expected = last(small_conditional, cond_fn=ours)
    assert not torch.allclose(expected, last(small_conditional), atol=1e-3)
    for cond_fn in (ours, upstreams):
        with torch.inference_mode():
            found = last(small_conditional, noise=X.clone(), y=Y.clone(), cond_fn=cond_fn)
        torch.testing.assert_close(found.clone(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_and_inputs_of_another_precision(small_conditional, classifier, dtype):
    network, diffusion = small_conditional
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"weights: wanted float32, got {name}; half precision is network.convert_to"):
        last((copy.deepcopy(network).to(dtype), diffusion))
    with pytest.raises(ValueError, match=f"weights: wanted float32, got {name}"):
        classifier.to(dtype)(X, T)
    with pytest.raises(ValueError, match=f"x: wanted float32, got {name}"):
        last(small_conditional, noise=X.to(dtype))


def test_a_network_with_a_torso_in_half_precision_is_right(small_conditional):
    network, _ = small_conditional
    expected = network(X, T, Y)
    network.convert_to(torch.bfloat16)
    torch.testing.assert_close(network(X, T, Y), expected, atol=0.1, rtol=0.1)


def test_sides_that_cannot_be_halved(small_conditional):
    with pytest.raises(ValueError, match="x: wanted sides that are multiples of 2, got 16×15"):
        last(small_conditional, noise=torch.zeros(2, 3, 16, 15))
    assert last(small_conditional, noise=torch.zeros(2, 3, 18, 14)).shape == (2, 3, 18, 14)


@pytest.mark.parametrize(
    ("y", "got"),
    [
        (torch.tensor([0.0, 1.0]), r"float32 \[2\]"),
        (torch.tensor([0, 5]), "0 to 5"),
        (torch.tensor([-1, 0]), "-1 to 0"),
        (torch.tensor([[0], [1]]), r"int64 \[2, 1\]"),
        (torch.tensor([0, 1, 2]), r"int64 \[3\]"),
        ([0, 1], "list"),
    ],
)
def test_labels_that_are_none(small_conditional, y, got):
    """Four classes and the null label."""
    said = "y: wanted classes, int64 from 0 to 4, one for 2 rows or for each; got "
    with pytest.raises(ValueError, match=said + got):
        last(small_conditional, y=y)


def test_one_label_may_stand_for_all_rows(small_conditional):
    expected = last(small_conditional, y=torch.tensor([3, 3]))
    for y in (torch.tensor([3]), torch.tensor(3)):
        torch.testing.assert_close(last(small_conditional, y=y), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("y", "got"), [(torch.tensor([0, 4]), "0 to 4"), (torch.tensor([0.0, 1.0]), "float32")])
def test_labels_that_the_classifier_does_not_have(classifier, y, got):
    with pytest.raises(ValueError, match=f"y: wanted classes of the classifier, int64 from 0 to 3; got {got}"):
        ClassifierGradient(classifier, 1.0)(X, T, y)


def test_dropout_while_sampling_is_said_once():
    network, diffusion = create_model_and_diffusion(**SMALL | {"timestep_respacing": "1"}, dropout=0.5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            diffusion.p_sample_loop(network, X.shape)
        diffusion.p_sample_loop(network.eval(), X.shape)
    assert len(said) == 1
    assert "training mode, with dropout 0.5" in str(said[0].message)
    with pytest.warns(UserWarning, match="dropout 0.5"):
        diffusion.ddim_reverse_sample_loop(network.train(), X)
