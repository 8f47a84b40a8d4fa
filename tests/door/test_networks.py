"""The door's `unet`, `nn` and `losses`: upstream's names and signatures, and what is patched in them acts."""

import math

import pytest
import torch

import guided_diffusion.losses as losses
import guided_diffusion.nn as layers
import guided_diffusion.unet as unet
from door_names import MODULES, assert_is_upstreams, assert_parameters
from guided_diffusion.diffusion import losses as room_losses
from guided_diffusion.networks import unet as room_unet
from guided_diffusion.networks.attention import find_block, record_attention, replace_attention
from guided_diffusion.training import trainer
from small import randomised

DOOR = {"unet": unet, "nn": layers, "losses": losses}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 700])
SMALL = {"attention_resolutions": [2], "channel_mult": (1, 2)}


def network(**settings):
    torch.manual_seed(0)
    return randomised(unet.UNetModel(8, 3, 32, 6, 1, **SMALL | settings))


def classifier(**settings):
    torch.manual_seed(0)
    return randomised(unet.EncoderUNetModel(8, 3, 32, 7, 1, **SMALL | settings))


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in DOOR for name in MODULES[module]])
def test_names_and_signatures_are_upstreams(module, name):
    assert_is_upstreams(module, name)


@pytest.mark.parametrize(
    "ours",
    [
        lambda a, c=1, b=2: ...,
        lambda a, b=2: ...,
        lambda a, b=2, c=2: ...,
        lambda a, b=2, *, d: ...,
        lambda a, b=2, c=1, d=3: ...,
        lambda a, b=2, *, c=1, d: ...,
    ],
)
def test_another_signature_is_seen(ours):
    assert_parameters(lambda a, b=2, *, c=1, d=3: ..., "(a, b=2, *, c=1)")
    with pytest.raises((AssertionError, KeyError)):
        assert_parameters(ours, "(a, b=2, c=1)")


def test_door_and_room_are_one_module():
    assert unet is room_unet
    assert losses is room_losses


class Spy:
    """Stands in for something callable and counts how often it is called."""

    def __init__(self, original):
        self.original, self.calls = original, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.original(*args, **kwargs)


def use_everything():
    """Build and call networks that together use every name of upstream's `unet`."""
    network()(X, T)
    network(conv_resample=False, use_new_attention_order=True)(X, T)
    classifier(pool="attention", num_head_channels=32)(X, T)


CLASSES = [
    "AttentionBlock", "AttentionPool2d", "Downsample", "QKVAttention", "QKVAttentionLegacy", "ResBlock",
    "TimestepEmbedSequential", "Upsample",
]  # fmt: skip
HELPERS = ["checkpoint", "conv_nd", "linear", "avg_pool_nd", "zero_module", "normalization", "timestep_embedding"]


@pytest.mark.parametrize(
    ("module", "name"),
    [(unet, name) for name in CLASSES + HELPERS] + [(layers, name) for name in [*HELPERS, "GroupNorm32"]],
)
def test_a_patch_acts_until_it_is_undone(module, name):
    original = getattr(module, name)
    spy = Spy(original)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, spy)
        use_everything()
        called = spy.calls
        assert called > 0
    use_everything()
    assert spy.calls == called
    assert getattr(module, name) is getattr(DOOR["unet"], name, original) is original


def test_patching_unet_leaves_nn_alone(monkeypatch):
    """So that a stand-in of a client may call what stands in nn."""
    plain = network()
    doubled = plain(X, 2 * T)
    assert not torch.allclose(plain(X, T), doubled, atol=1e-3)
    monkeypatch.setattr(unet, "timestep_embedding", lambda t, dim: layers.timestep_embedding(2 * t, dim))
    torch.testing.assert_close(plain(X, T), doubled)


def test_patches_of_nn_and_losses_act_in_other_rooms():
    for module, name, other in [(layers, "update_ema", trainer), (losses, "mean_flat", layers)]:
        original, mine = getattr(module, name), Spy(None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, mine)
            assert getattr(other, name) is mine
        assert getattr(other, name) is original
        assert getattr(module, name) is original


def test_a_new_name_stays_where_it_is_set(monkeypatch):
    monkeypatch.setattr(layers, "a_name_of_mine", None, raising=False)
    assert layers.a_name_of_mine is None
    assert not hasattr(unet, "a_name_of_mine")


def test_a_part_of_the_bound_may_be_patched(monkeypatch):
    zeros = torch.zeros(2, 3, 4, 4)
    assert losses.discretized_gaussian_log_likelihood(zeros, means=zeros, log_scales=zeros).max() < -1
    monkeypatch.setattr(losses, "approx_standard_normal_cdf", lambda x: (x > 0).float())
    assert losses.discretized_gaussian_log_likelihood(zeros, means=zeros, log_scales=zeros).max() == 0


class PlainAttention(torch.nn.Module):
    """A client's attention, which knows nothing of recording; channels are ordered head by head."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, tokens = qkv.shape
        d = width // (3 * self.n_heads)
        q, k, v = qkv.reshape(n * self.n_heads, 3 * d, tokens).split(d, dim=1)
        weights = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(d)).softmax(dim=-1)
        return torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, tokens)


def test_a_clients_attention_is_recorded_and_replaced_as_ours(monkeypatch):
    ours = network(num_heads=2)
    monkeypatch.setattr(unet, "QKVAttentionLegacy", PlainAttention)
    theirs = network(num_heads=2)
    assert type(theirs.middle_block[1].attention) is PlainAttention
    found = []
    for each in (ours, theirs):
        block = find_block(each, "middle_block.1")
        with record_attention(block) as scores:
            output = each(X, T)
        with replace_attention(block, fn=lambda q, k, v: v):
            found.append((output, scores[block], each(X, T)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0][0], found[0][2])


def test_an_attention_block_that_cannot_be_heard_is_not_offered(monkeypatch):
    before = network()
    monkeypatch.setattr(unet, "AttentionBlock", lambda channels, **_: torch.nn.Identity())
    with pytest.raises(ValueError, match="it has: none"):
        find_block(network(), "middle_block.1")
    assert find_block(before, "middle_block.1")


class Shift(unet.TimestepBlock):
    """A client's block: adds the embedding's first numbers."""

    def forward(self, x, emb):
        return x + emb[:, : x.shape[1], None, None]


def test_a_clients_timestep_block_is_given_the_embedding():
    emb = torch.randn(2, 5)
    block = unet.TimestepEmbedSequential(Shift(), torch.nn.Identity(), unet.TimestepEmbedSequential(Shift()))
    torch.testing.assert_close(block(X, emb), X + 2 * emb[:, :3, None, None])
    assert isinstance(block, unet.TimestepBlock)
    assert issubclass(unet.ResBlock, unet.TimestepBlock)


SETTINGS = {
    "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 5, "num_res_blocks": 1,
    "attention_resolutions": (1, 2), "dropout": 0.25, "channel_mult": (1, 2), "conv_resample": False, "dims": 2,
    "num_classes": 4, "use_checkpoint": True, "use_fp16": False, "num_heads": 2, "num_head_channels": -1,
    "num_heads_upsample": 4, "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["UNetModel", "SuperResModel", "EncoderUNetModel"])
def test_positions_mean_what_keywords_mean(name):
    settings, call = dict(SETTINGS), {"y": torch.tensor([0, 3])}
    if name == "EncoderUNetModel":
        del settings["num_classes"]
        settings["pool"], call = "spatial", {}
    if name == "SuperResModel":
        call["low_res"] = X[:, :, :4, :4]
    found = []
    for build in (lambda make: make(*settings.values()), lambda make: make(**settings)):
        torch.manual_seed(0)
        found.append(randomised(build(getattr(unet, name))))
    by_position, by_keyword = found
    for key, value in settings.items():
        if key not in ("image_size", "in_channels", "use_fp16"):
            assert getattr(by_position, key) == getattr(by_keyword, key) == value
    assert by_position.state_dict().keys() == by_keyword.state_dict().keys()
    assert not any(".op." in key or ".conv." in key for key in by_keyword.state_dict())
    assert torch.equal(by_position(X, T, **call), by_keyword(X, T, **call))
    heads = {block.num_heads for block in by_keyword.modules() if isinstance(block, unet.AttentionBlock)}
    assert heads == ({2} if name == "EncoderUNetModel" else {2, 4})


def test_super_resolution_takes_low_res_third():
    torch.manual_seed(0)
    upsampler = randomised(unet.SuperResModel(8, 3, 32, 6, 1, **SMALL, num_classes=4))
    low_res, y = X[:, :, :4, :4], torch.tensor([0, 3])
    assert torch.equal(upsampler(X, T, low_res, y=y), upsampler(X, T, y=y, low_res=low_res))


def test_blocks_by_position_as_upstream_makes_them():
    emb = torch.randn(2, 16)
    block = unet.ResBlock(32, 16, 0.0, 64, True, True, 1, True, False, True)
    assert block.skip_connection.kernel_size == (3,)
    assert block(torch.randn(2, 32, 8), emb).shape == (2, 64, 4)
    assert unet.ResBlock(32, 16, 0.0, 64, up=True)(torch.randn(2, 32, 8, 8), emb).shape == (2, 64, 16, 16)
    volume = torch.randn(1, 32, 2, 4, 4)
    assert unet.Upsample(32, True, 3, 64)(volume).shape == (1, 64, 2, 8, 8)
    assert unet.Downsample(32, True, 3, 64)(volume).shape == (1, 64, 2, 2, 2)
    torch.testing.assert_close(unet.Downsample(32, False, 3)(unet.Upsample(32, False, 3)(volume)), volume)
    with pytest.raises(ValueError, match="out_channels: averages keep 32 channels; 64 need use_conv"):
        unet.Downsample(32, False, out_channels=64)


@pytest.mark.parametrize(("dims", "sides"), [(1, (16,)), (3, (2, 8, 8))])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_signals_of_other_dimensions(dims, sides, resblock_updown):
    signal = torch.randn(2, 3, *sides)
    settings = {"dims": dims, "resblock_updown": resblock_updown, "use_scale_shift_norm": True}
    whole = network(**settings)
    block = find_block(whole, "middle_block.1")
    with record_attention(block) as scores:
        assert whole(signal, T).shape == (2, 6, *sides)
    inner = [side // 2 for side in sides[-2:]]
    assert scores[block].shape == (2, *sides[:-2], *inner)
    for pool in ("adaptive", "spatial"):
        assert classifier(**settings, pool=pool)(signal, T).shape == (2, 7)
    with pytest.raises(ValueError, match="dims: wanted 1, 2 or 3, got 4"):
        network(dims=4)


def test_use_fp16_says_what_the_torso_is_given():
    half = network(use_fp16=True)
    assert half.dtype is torch.float16
    half.convert_to_fp32()
    assert half.dtype is torch.float32
    assert torch.equal(half(X, T), network()(X, T))
    half.convert_to(torch.bfloat16)
    assert half.dtype is half.middle_block[1].qkv.weight.dtype is torch.bfloat16
    half.convert_to_fp32()
    assert half.middle_block[1].qkv.weight.dtype is torch.float32
    half.dtype = torch.float64
    assert half.dtype is torch.float64
    with pytest.raises(RuntimeError):
        half(X, T)


def test_checkpointing_computes_again_and_changes_no_gradient():
    found = []
    for flag in (False, True):
        each = network(use_checkpoint=flag, resblock_updown=True).requires_grad_(True)
        calls = []
        each.middle_block[0].in_layers[2].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = X.clone().requires_grad_(True)
        each(x, T).square().mean().backward()
        assert len(calls) == 1 + flag
        found.append([x.grad, *(parameter.grad for parameter in each.parameters())])
    for without, with_ in zip(*found, strict=True):
        torch.testing.assert_close(without, with_)
        assert without.abs().max() > 0


def test_checkpoint_by_hand():
    weight, calls = torch.tensor(3.0, requires_grad=True), []

    def multiply(x, y):
        calls.append(1)
        return weight * x * y

    x = torch.tensor(2.0, requires_grad=True)
    layers.checkpoint(multiply, (x, torch.tensor(5.0)), iter([weight]), True).backward()
    assert (x.grad, weight.grad, len(calls)) == (15, 10, 2)
    with torch.no_grad():
        assert layers.checkpoint(multiply, [x, x], [weight], True) == 12
    assert len(calls) == 3


def test_moving_average():
    target, source = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    wanted = [0.99 * t + 0.01 * s for t, s in zip(target.parameters(), source.parameters(), strict=True)]
    layers.update_ema(target.parameters(), source.half().parameters())
    torch.testing.assert_close(list(target.parameters()), wanted, rtol=1e-3, atol=1e-5)
    layers.update_ema([], [])
    with pytest.raises(ValueError, match="zip"):
        layers.update_ema(target.parameters(), [])


def test_small_helpers():
    module = layers.linear(2, 3)
    weight = module.weight.detach().clone()
    assert layers.scale_module(module, 0.5) is module
    assert torch.equal(module.weight, weight / 2)
    assert layers.conv_nd(1, 2, 3, 5, padding=2)(torch.ones(1, 2, 8)).shape == (1, 3, 8)
    assert layers.avg_pool_nd(3, kernel_size=2)(torch.ones(1, 2, 4, 4, 4)).shape == (1, 2, 2, 2, 2)
    assert layers.normalization(64).num_groups == 32
    torch.testing.assert_close(layers.SiLU()(X), X * X.sigmoid())
    torch.testing.assert_close(layers.mean_flat(X), X.mean(dim=(1, 2, 3)))
    counted = torch.nn.Module()
    counted.total_ops = torch.zeros(1, dtype=torch.float64)
    unet.QKVAttention.count_flops(counted, None, (torch.ones(2, 5, 3, 4),))
    assert counted.total_ops == 2 * 2 * 5 * 12**2


def test_divergence_takes_numbers():
    mean, logvar = torch.randn(2, 4)
    zero = torch.zeros(4)
    assert torch.equal(losses.normal_kl(mean, logvar, 0.0, 0.0), losses.normal_kl(mean, logvar, zero, zero))
    assert torch.equal(losses.normal_kl(0.0, 0.0, mean, 0.5), losses.normal_kl(zero, zero, mean, zero + 0.5))
