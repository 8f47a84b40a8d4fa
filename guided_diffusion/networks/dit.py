"""The diffusion transformer DiT (Peebles & Xie 2023, arXiv 2212.09748), with the tensor names of its weights."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..settings.transformer import dit_sizes
from .attention import Attend, Listener, of_this_thread, split_new
from .layers import embedded_labels, timestep_embedding, zero_module
from .precision import Weighted, WithTorso, compile_each

TIMESTEP_WIDTH = 256
EPS = 1e-6


def sincos_positions(side: int, width: int) -> Tensor:
    """The fixed embedding of a square grid's places, [side², width]: half of it says the column, the other the row.

    Each half is sin, then cos, of the place times 10000^(−i / (width/4)), i = 0 … width/4 − 1.
    """
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64), rates)
    of_place = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = of_place.repeat(side, 1), of_place.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x)(1 + scale) + shift of tokens [N, T, C], with a layer norm that has no weights; shift, scale [N, 1, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """What makes so many shifts, scales and gates of the condition: [N, C] to [N, parts · C], at first 0."""
    return nn.Sequential(nn.SiLU(), zero_module(nn.Linear(hidden_size, parts * hidden_size)))


class DiTBlock(nn.Module):
    """Attention, then an MLP, both scaled, shifted and gated by the condition: [N, T, C] and [N, C] to [N, T, C].

    The T tokens are a square, row by row.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.num_heads = num_heads
        inside = int(hidden_size * mlp_ratio)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(hidden_size, 3 * hidden_size), "proj": nn.Linear(hidden_size, hidden_size)}
        )
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(hidden_size, inside), act=nn.GELU(approximate="tanh"), fc2=nn.Linear(inside, hidden_size)
            )
        )
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor, *, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        """attend: does the attention in the place of the block's own."""
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        values = attend(*self.split(self.attn["qkv"](modulated(x, shift, scale))))
        x = x + gate * self.attn["proj"](values.transpose(1, 2).flatten(2).to(x.dtype))
        return x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, T, 3·C], all q, then all k, then all v, head by head, as q, k, v of [N, heads, T, d]."""
        return split_new(qkv.transpose(1, 2), self.num_heads)

    def listen(self, listener: Listener) -> list[RemovableHandle]:
        """As `Attends.listen`."""

        def hear(_qkv: nn.Module, _inputs: tuple[Tensor], qkv: Tensor) -> None:
            side = math.isqrt(qkv.shape[1])
            q, k, _ = self.split(qkv)
            listener(q, k, (side, side))

        return [self.attn["qkv"].register_forward_hook(of_this_thread(hear))]

    def replace(self, fn: Attend) -> RemovableHandle:
        """As `Replaceable.replace`."""

        def attend(_block: nn.Module, inputs: tuple[Tensor, ...], _more: dict[str, Any]) -> Any:
            return inputs, {"attend": fn}

        return self.register_forward_pre_hook(of_this_thread(attend), with_kwargs=True)


class FinalLayer(nn.Module):
    """Tokens to what they stand for: [N, T, C] and [N, C] to [N, T, patch² · out_channels]; at first all 0."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = zero_module(nn.Linear(hidden_size, patch_size**2 * out_channels))
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


class DiT(WithTorso):
    """Denoising transformer: [N, in_channels, S, S], timesteps [N] and labels [N] to [N, out_channels, S, S].

    S is input_size; its patches of patch_size² pixels are the tokens. `y`: int64 in [0, num_classes], of which
    num_classes is the null label. With learn_sigma out_channels is 2 · in_channels: ε, then what says Σ.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch_size: {patch_size} does not divide the side of {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size: wanted a multiple of 4 and of {num_heads} heads, got {hidden_size}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_heads, self.num_classes = num_heads, num_classes
        positions = sincos_positions(input_size // patch_size, hidden_size)[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)})
        layers = nn.Linear(TIMESTEP_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """The weights that training begins with, but for those that are 0."""
        for block in self.blocks:
            for linear in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                nn.init.xavier_uniform_(block.get_parameter(f"{linear}.weight"))
                nn.init.zeros_(block.get_parameter(f"{linear}.bias"))
        nn.init.xavier_uniform_(self.get_parameter("x_embedder.proj.weight").flatten(1))
        nn.init.zeros_(self.get_parameter("x_embedder.proj.bias"))
        for layer in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
            nn.init.normal_(self.get_parameter(f"{layer}.weight"), std=0.02)

    def torso(self) -> Iterator[Weighted]:
        return (module for module in self.blocks.modules() if isinstance(module, nn.Linear))

    def compile_blocks(self) -> None:
        """Compile the MLPs, once for each shape; the attention between them stays open to hooks."""
        compile_each(block.get_submodule("mlp") for block in self.blocks)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        wanted = (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != wanted:
            raise ValueError(f"x: wanted {'×'.join(map(str, wanted))}, got {'×'.join(map(str, x.shape[1:]))}")
        embedding = timestep_embedding(timesteps, TIMESTEP_WIDTH)
        self.check_dtypes(x, embedding, self.t_embedder, self.final_layer)
        table = self.y_embedder["embedding_table"]
        assert isinstance(table, nn.Embedding)
        c = self.t_embedder["mlp"](embedding) + embedded_labels(table, y, len(x))
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        tokens, condition = tokens.type(self.dtype), c.type(self.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._image(self.final_layer(tokens.type(x.dtype), c))

    def _image(self, tokens: Tensor) -> Tensor:
        """[N, T, patch² · out_channels], of a patch row by row with its channels last, to [N, out_channels, S, S]."""
        side, patch = self.input_size // self.patch_size, self.patch_size
        parts = tokens.reshape(len(tokens), side, side, patch, patch, self.out_channels)
        return parts.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), self.out_channels, *[self.input_size] * 2)


def named(name: str, **arguments: Any) -> DiT:
    """The DiT of a name, `DiT-XL/2` or as `dit_sizes` has it; arguments: the others of `DiT`."""
    return DiT(**dit_sizes(name)._asdict(), **arguments)
