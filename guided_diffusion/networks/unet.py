"""The ADM/IDDPM networks (Dhariwal & Nichol 2021; Nichol & Dhariwal 2021), under upstream's names."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention import Attend, Listener, Split, TokenLinear, of_this_thread, split_legacy, split_new
from .layers import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    embedded_labels,
    layer_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from .precision import Weighted, WithTorso, compile_each

TORSO = ("input_blocks.", "middle_block.", "output_blocks.")
FIRST = "input_blocks.0.0"


class TimestepBlock(nn.Module):
    """A layer that takes the timestep embedding as its second input."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N, C, ...] and [N, emb_channels] to [N, C', ...]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence in which every `TimestepBlock` also gets the timestep embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # upstream's class
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


def _factor(dims: int) -> int | tuple[int, int, int]:
    """By how much a level is smaller than the one before: half the sides; of a volume, not its first."""
    return (1, 2, 2) if dims == 3 else 2


class Upsample(nn.Module):
    """Double the sides by nearest neighbour; with `use_conv`, a convolution of width 3 follows."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.factor = _factor(dims)
        self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


class Downsample(nn.Module):
    """Halve the sides: a strided convolution of width 3 with `use_conv`, else averages."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        factor = _factor(dims)
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=factor, padding=1)
        elif self.out_channels == channels:
            self.op = avg_pool_nd(dims, kernel_size=factor, stride=factor)
        else:
            raise ValueError(f"out_channels: averages keep {channels} channels; {out_channels} need use_conv")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """Residual block conditioned on the timestep embedding; `up` or `down` resamples inside it.

    [N, channels, ...] and [N, emb_channels] to [N, out_channels, ...]. `use_conv` makes the skip connection of another
    width a convolution of width 3 instead of 1.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        resampling = Upsample if up else Downsample if down else nn.Identity
        self.resample = resampling(channels, False, dims)
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        emb_out = self.emb_layers(emb).type(h.dtype)
        emb_out = emb_out.reshape(*emb_out.shape, *[1] * (h.ndim - 2))
        norm, activation, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb_out)
        return self.skip_connection(self.resample(x)) + conv(dropout(activation(h)))


def count_flops_attn(model: Any, _x: Any, y: Sequence[Tensor]) -> None:
    """A counter for `thop`: add to `model.total_ops` the two matrix products over the tokens of `y[0]`, [N, C, ...]."""
    n, channels, *sides = y[0].shape
    model.total_ops += torch.tensor([2 * n * channels * math.prod(sides) ** 2], dtype=torch.float64)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused attention of q, k, v, each [N, heads, T, d], to [N, C, T]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


class QKVAttention(nn.Module):
    """Attention over tokens, [N, 3·C, T] in the order of `split_new` to [N, C, T]. Holds no parameters."""

    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        return _attend(*split_new(qkv, self.n_heads))


class QKVAttentionLegacy(nn.Module):
    """Attention over tokens, [N, 3·C, T] in the order of `split_legacy` to [N, C, T]. Holds no parameters."""

    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        return _attend(*split_legacy(qkv, self.n_heads))


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels of a feature map: [N, C, ...] to the same shape."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(f"num_head_channels: {num_head_channels} does not divide {channels} channels")
            num_heads = channels // num_head_channels
        elif channels % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide {channels} channels")
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = TokenLinear(channels, 3 * channels)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(num_heads)
        self.proj_out = zero_module(TokenLinear(channels, channels))

    def forward(self, x: Tensor, *, attend: Attend | None = None) -> Tensor:
        """attend: does the attention in the place of the block's own."""
        forward = partial(self._forward, attend=attend) if attend else self._forward
        return checkpoint(forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, *, attend: Attend | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))
        if attend:
            values = attend(*self.split(qkv)).transpose(-1, -2).flatten(1, 2).to(qkv.dtype)
        else:
            values = self.attention(qkv)
        return x + self.proj_out(values).reshape(x.shape)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `attention` is given, [N, 3·C, T], as q, k, v of [N, heads, T, d]."""
        return (split_new if self.use_new_attention_order else split_legacy)(qkv, self.num_heads)

    def listen(self, listener: Listener, split: Split | None = None) -> list[RemovableHandle]:
        """As `Attends.listen`; `split` reads q, k, v from [N, 3·C, T] in another way than the block itself does."""
        grid: list[int] = []

        def see(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            grid[:] = inputs[0].shape[2:]

        def hear(_qkv: nn.Module, _inputs: tuple[Tensor], qkv: Tensor) -> None:
            q, k, _ = (split or self.split)(qkv)
            listener(q, k, tuple(grid))

        return [
            self.register_forward_pre_hook(of_this_thread(see)),
            self.qkv.register_forward_hook(of_this_thread(hear)),
        ]

    def replace(self, fn: Attend) -> RemovableHandle:
        """As `Replaceable.replace`."""

        # An argument, not a hook on `attention`: so it is there also where `checkpoint` computes again.
        def attend(_block: nn.Module, inputs: tuple[Tensor, ...], _more: dict[str, Any]) -> Any:
            return inputs, {"attend": fn}

        return self.register_forward_pre_hook(of_this_thread(attend), with_kwargs=True)


class AttentionPool2d(nn.Module):
    """CLIP's pooling: a mean token attends to all pixels; [N, embed_dim, S, S] to [N, output_dim], S = spacial_dim."""

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = TokenLinear(embed_dim, 3 * embed_dim)
        self.c_proj = TokenLinear(embed_dim, output_dim or embed_dim)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        return self.c_proj(self.attention(self.qkv_proj(tokens)))[:, :, 0]


class _Network(WithTorso):
    """What denoising networks and classifiers share: their blocks, and a torso that may compute in another dtype."""

    in_channels: int
    model_channels: int
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    dropout: float
    channel_mult: Sequence[float]
    conv_resample: bool
    dims: int
    use_checkpoint: bool
    num_heads: int
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    time_embed: nn.Sequential
    input_blocks: nn.ModuleList
    out: nn.Sequential

    def torso(self) -> Iterator[Weighted]:
        for name, module in self.named_modules():
            if name.startswith(TORSO) and name != FIRST and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                yield module

    def _embed(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The timesteps' embeddings, [N, 4 · model_channels]; a ValueError where precisions do not go together."""
        embedding = timestep_embedding(timesteps, self.model_channels)
        self.check_dtypes(x, embedding, self.time_embed, self.out)
        return self.time_embed(embedding)

    def convert_to(self, dtype: torch.dtype) -> None:
        """As `WithTorso`; the first layer is converted too, but not to bfloat16.

        That would leave two digits of x_t, which is most of the error of the whole.
        """
        super().convert_to(dtype)
        self.input_blocks[0].to(torch.float32 if dtype is torch.bfloat16 else dtype)

    def _rising(self, x: Tensor, emb: Tensor) -> Iterator[Tensor]:
        """What every input block puts out, one after the other, in the torso's dtype; the first has one of its own."""
        own, dtype = next(self.input_blocks.parameters()).dtype, self.dtype
        h = x.type(own)
        for block in self.input_blocks:
            h = block(h, emb)
            h = h if own is dtype else h.type(dtype)
            yield h

    def compile_blocks(self) -> None:
        """Compile the residual blocks, once for each shape; the attention between them stays open to hooks."""
        compile_each(module for module in self.modules() if isinstance(module, ResBlock))

    def _time_embed(self) -> nn.Sequential:
        width = 4 * self.model_channels
        return nn.Sequential(linear(self.model_channels, width), nn.SiLU(), linear(width, width))

    def _res(self, channels: int, out_channels: int, **resampling: bool) -> nn.Module:
        return ResBlock(
            channels,
            4 * self.model_channels,
            self.dropout,
            out_channels=out_channels,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            **resampling,
        )

    def _attention(self, channels: int, num_heads: int) -> nn.Module:
        return AttentionBlock(
            channels,
            use_checkpoint=self.use_checkpoint,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_new_attention_order=self.use_new_attention_order,
        )

    def _widths(self) -> list[int]:
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    def _down(self) -> tuple[nn.ModuleList, list[int]]:
        """The downward path, and the number of channels that each of its blocks puts out."""
        widths = self._widths()
        ch = widths[0]
        blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, ch, 3, padding=1))])
        channels = [ch]
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                layers = [self._res(ch, width)]
                ch = width
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(ch, self.num_heads))
                blocks.append(TimestepEmbedSequential(*layers))
                channels.append(ch)
            if level < len(widths) - 1:
                if self.resblock_updown:
                    down = self._res(ch, ch, down=True)
                else:
                    down = Downsample(ch, self.conv_resample, dims=self.dims, out_channels=ch)
                blocks.append(TimestepEmbedSequential(down))
                channels.append(ch)
        return blocks, channels

    def _middle(self, ch: int) -> nn.Module:
        return TimestepEmbedSequential(self._res(ch, ch), self._attention(ch, self.num_heads), self._res(ch, ch))


class UNetModel(_Network):
    """Denoising UNet: [N, in_channels, S, S], timesteps [N] and labels [N] to [N, out_channels, S, S].

    `attention_resolutions` are downsampling factors (2 = half the image's side). `channel_mult` gives one width a
    level, in units of `model_channels`. With `num_head_channels` ≠ -1 it decides the number of heads, not `num_heads`.
    `num_classes` makes the network class-conditional: it then needs `y`, [N] int64 in [0, num_classes). With
    `conv_resample` levels are resampled by convolutions. dims: 1, 2 or 3, of the signal. `use_fp16` says that
    the torso will be converted to float16 before it is called.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.channel_mult, self.num_res_blocks = model_channels, channel_mult, num_res_blocks
        self.attention_resolutions, self.dropout, self.num_classes = attention_resolutions, dropout, num_classes
        self.conv_resample, self.dims, self.use_checkpoint = conv_resample, dims, use_checkpoint
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm, self.resblock_updown = use_scale_shift_norm, resblock_updown
        self.use_new_attention_order = use_new_attention_order
        self._dtype = torch.float16 if use_fp16 else None
        self.time_embed = self._time_embed()
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, 4 * model_channels)
        self.input_blocks, skips = self._down()
        ch = skips[-1]
        self.middle_block = self._middle(ch)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self._widths()))):
            for i in range(num_res_blocks + 1):
                layers = [self._res(ch + skips.pop(), width)]
                ch = width
                if 2**level in attention_resolutions:
                    layers.append(self._attention(ch, self.num_heads_upsample))
                if level and i == num_res_blocks:
                    if resblock_updown:
                        layers.append(self._res(ch, ch, up=True))
                    else:
                        layers.append(Upsample(ch, conv_resample, dims=dims, out_channels=ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        factor, sides = 2 ** (len(self.channel_mult) - 1), x.shape[3 if self.dims == 3 else 2 :]
        if any(side % factor for side in sides):
            raise ValueError(f"x: wanted sides that are multiples of {factor}, got {'×'.join(map(str, sides))}")
        if (y is None) != (self.num_classes is None):
            raise ValueError("labels y go with a class-conditional network, and only with one")
        emb = self._embed(x, timesteps)
        if y is not None:
            emb = emb + embedded_labels(self.label_emb, y, len(x))
        skips = list(self._rising(x, emb))
        h = self.middle_block(skips[-1], emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class SuperResModel(UNetModel):
    """A UNet that also sees a low-resolution image, upsampled and stacked onto its input's channels."""

    def __init__(self, image_size: int, in_channels: int, *args, **kwargs):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(  # type: ignore[override]  # upstream's class
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, *, y: Tensor | None = None
    ) -> Tensor:
        """As UNetModel, with `low_res` [N, C, s, s] of any side s, in [-1, 1]."""
        if low_res is None:
            raise ValueError("a super-resolution network needs low_res")
        upsampled = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, upsampled], dim=1), timesteps, y)


class EncoderUNetModel(_Network):
    """The UNet's downward half with a pooled head, the noisy-image classifier: [N, C, S, S], [N] to [N, out_channels].

    Arguments as UNetModel; there is no upward half, so `num_heads_upsample` says nothing.
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
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.pool = in_channels, out_channels, pool
        self.model_channels, self.channel_mult, self.num_res_blocks = model_channels, channel_mult, num_res_blocks
        self.attention_resolutions, self.dropout = attention_resolutions, dropout
        self.conv_resample, self.dims, self.use_checkpoint = conv_resample, dims, use_checkpoint
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm, self.resblock_updown = use_scale_shift_norm, resblock_updown
        self.use_new_attention_order = use_new_attention_order
        self._dtype = torch.float16 if use_fp16 else None
        self.time_embed = self._time_embed()
        self.input_blocks, channels = self._down()
        ch = channels[-1]
        self.middle_block = self._middle(ch)
        features = sum(channels) + ch
        if pool == "adaptive":
            head = [layer_nd("AdaptiveAvgPool", dims)(1), zero_module(conv_nd(dims, ch, out_channels, 1)), nn.Flatten()]
            self.out = nn.Sequential(normalization(ch), nn.SiLU(), *head)
        elif pool == "attention":
            if num_head_channels == -1:
                raise ValueError("num_head_channels: wanted one for the pool `attention`, got -1")
            side = image_size // 2 ** (len(channel_mult) - 1)
            pooled = AttentionPool2d(side, ch, num_head_channels, out_channels)
            self.out = nn.Sequential(normalization(ch), nn.SiLU(), pooled)
        elif pool == "spatial":
            self.out = nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
        elif pool == "spatial_v2":
            hidden = [nn.Linear(features, 2048), normalization(2048), nn.SiLU()]
            self.out = nn.Sequential(*hidden, nn.Linear(2048, out_channels))
        else:
            raise ValueError(f"classifier_pool: {pool!r} is none of adaptive, attention, spatial, spatial_v2")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self._embed(x, timesteps)
        spatial, means = self.pool.startswith("spatial"), []
        for h in self._rising(x, emb):
            if spatial:
                means.append(self._mean(h, x.dtype))
        h = self.middle_block(h, emb)
        return self.out(torch.cat([*means, self._mean(h, x.dtype)], dim=1) if spatial else h.type(x.dtype))

    @staticmethod
    def _mean(h: Tensor, dtype: torch.dtype) -> Tensor:
        return h.type(dtype).mean(dim=tuple(range(2, h.ndim)))
