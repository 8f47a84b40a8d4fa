"""The ADM/IDDPM networks (Dhariwal & Nichol 2021; Nichol & Dhariwal 2021), with upstream's tensor names."""

import logging
from collections.abc import Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionBlock, AttentionPool2d
from .layers import Downsample, GroupNorm32, Upsample, timestep_embedding, zero_module

log = logging.getLogger(__name__)

TORSO = ("input_blocks.", "middle_block.", "output_blocks.")
RECOMPILE_LIMIT = 1024
"""Blocks times batch sizes that may be compiled before torch goes on uncompiled; its own limit is 8."""


class ResBlock(nn.Module):
    """Residual block conditioned on the timestep embedding; `up` or `down` resamples inside it.

    [N, C, H, W] and [N, emb_channels] to [N, out_channels, H', W'].
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample = Upsample(channels, False) if up else Downsample(channels, False) if down else nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        emb_out = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        norm, activation, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb_out)
        return self.skip_connection(self.resample(x)) + conv(dropout(activation(h)))


class TimestepEmbedSequential(nn.Sequential):
    """A sequence in which residual blocks also get the timestep embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def _time_embed(model_channels: int) -> nn.Sequential:
    width = 4 * model_channels
    return nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))


def _encoder(
    in_channels: int,
    widths: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    resblock_updown: bool,
    res: partial,
    attention: partial,
) -> tuple[nn.ModuleList, list[int]]:
    """The downward path, and the number of channels that each of its blocks puts out."""
    ch = widths[0]
    blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))])
    channels = [ch]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers = [res(ch, width)]
            ch = width
            if 2**level in attention_resolutions:
                layers.append(attention(ch))
            blocks.append(TimestepEmbedSequential(*layers))
            channels.append(ch)
        if level < len(widths) - 1:
            blocks.append(TimestepEmbedSequential(res(ch, ch, down=True) if resblock_updown else Downsample(ch, True)))
            channels.append(ch)
    return blocks, channels


@cache
def _say(remark: str) -> None:
    log.warning(remark)


def _half_precision(device: torch.device) -> torch.dtype:
    """What use_fp16 means on a device; said once where that is not float16, which CPUs compute 200 times slower."""
    if device.type != "cpu":
        return torch.float16
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        _say("use_fp16: on this CPU half precision is bfloat16, not float16")
        return torch.bfloat16
    _say("use_fp16: this CPU has no fast half precision; going on in float32")
    return torch.float32


class _Network(nn.Module):
    """What denoising networks and classifiers share: a torso that may compute in another dtype than the rest."""

    input_blocks: nn.ModuleList

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the torso computes."""
        return self.input_blocks[0][0].weight.dtype

    def convert_to(self, dtype: torch.dtype) -> None:
        """Compute the torso in float16 (GPU only) or bfloat16; embeddings, normalisation and output stay in float32."""
        for name, module in self.named_modules():
            if name.startswith(TORSO) and isinstance(module, (nn.Conv1d, nn.Conv2d)):
                module.to(dtype)

    def compile_blocks(self) -> None:
        """Compile the residual blocks, once for each shape; the attention between them stays open to hooks."""
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.compile(dynamic=False)

    def convert_to_fp16(self) -> None:
        """Compute the torso in the half precision of the device: float16, or bfloat16 on a CPU that has it."""
        self.convert_to(_half_precision(next(self.parameters()).device))


class UNetModel(_Network):
    """Denoising UNet: [N, in_channels, S, S], timesteps [N] and labels [N] to [N, out_channels, S, S].

    `attention_resolutions` are downsampling factors (2 = half the image's side). `channel_mult` gives one width a
    level, in units of `model_channels`. With `num_head_channels` ≠ -1 it decides the number of heads, not `num_heads`.
    `num_classes` makes the network class-conditional: it then needs `y`, [N] int64 in [0, num_classes).
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.num_heads = num_heads
        emb_channels = 4 * model_channels
        widths = [int(mult * model_channels) for mult in channel_mult]
        res = partial(
            ResBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
        )
        attention = partial(
            AttentionBlock,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        self.time_embed = _time_embed(model_channels)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        self.input_blocks, skips = _encoder(
            in_channels,
            widths,
            num_res_blocks,
            attention_resolutions,
            resblock_updown,
            res,
            partial(attention, num_heads=num_heads),
        )
        ch = skips[-1]
        self.middle_block = TimestepEmbedSequential(res(ch, ch), attention(ch, num_heads=num_heads), res(ch, ch))
        up_heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [res(ch + skips.pop(), width)]
                ch = width
                if 2**level in attention_resolutions:
                    layers.append(attention(ch, num_heads=up_heads))
                if level and i == num_res_blocks:
                    layers.append(res(ch, ch, up=True) if resblock_updown else Upsample(ch, True))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm32(ch), nn.SiLU(), zero_module(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is None) != (self.num_classes is None):
            raise ValueError("labels y go with a class-conditional network, and only with one")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.type(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class SuperResModel(UNetModel):
    """A UNet that also sees a low-resolution image, upsampled and stacked onto its input's channels."""

    def __init__(self, image_size: int, in_channels: int, *args, **kwargs):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """As UNetModel, with `low_res` [N, C, s, s] of any side s, in [-1, 1]."""
        if low_res is None:
            raise ValueError("a super-resolution network needs low_res")
        upsampled = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, upsampled], dim=1), timesteps, y)


class EncoderUNetModel(_Network):
    """The UNet's downward half with a pooled head, the noisy-image classifier: [N, C, S, S], [N] to [N, out_channels].

    pool: `adaptive` (mean), `attention` (CLIP's), `spatial` or `spatial_v2` (means of every block, then an MLP).
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        super().__init__()
        self.model_channels = model_channels
        self.pool = pool
        widths = [int(mult * model_channels) for mult in channel_mult]
        res = partial(
            ResBlock,
            emb_channels=4 * model_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
        )
        attention = partial(
            AttentionBlock,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        self.time_embed = _time_embed(model_channels)
        self.input_blocks, channels = _encoder(
            in_channels, widths, num_res_blocks, attention_resolutions, resblock_updown, res, attention
        )
        ch = channels[-1]
        self.middle_block = TimestepEmbedSequential(res(ch, ch), attention(ch), res(ch, ch))
        features = sum(channels) + ch
        if pool == "adaptive":
            head = [nn.AdaptiveAvgPool2d((1, 1)), zero_module(nn.Conv2d(ch, out_channels, 1)), nn.Flatten()]
            self.out = nn.Sequential(GroupNorm32(ch), nn.SiLU(), *head)
        elif pool == "attention":
            side = image_size // 2 ** (len(widths) - 1)
            head = AttentionPool2d(side, ch, num_head_channels, out_channels)
            self.out = nn.Sequential(GroupNorm32(ch), nn.SiLU(), head)
        elif pool == "spatial":
            self.out = nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
        elif pool == "spatial_v2":
            hidden = [nn.Linear(features, 2048), GroupNorm32(2048), nn.SiLU()]
            self.out = nn.Sequential(*hidden, nn.Linear(2048, out_channels))
        else:
            raise ValueError(f"classifier_pool: {pool!r} is none of adaptive, attention, spatial, spatial_v2")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h = x.type(self.dtype)
        means = []
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.type(x.dtype).mean(dim=(2, 3)))
        return self.out(torch.cat(means, dim=1) if means else h.type(x.dtype))
