"""Token perturbation guidance (Rajabi et al., NeurIPS 2025, arXiv 2506.10036)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...diffusion.noise import TOKENS, sent
from ...networks.altering import altered
from ..base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenPerturbationGuidance(Guidance):
    """Δ = ε(x_t, c) − ε'(x_t, c), where ε' shuffles the tokens that go into each of `blocks` (TPG).

    The tokens are the pixels of a UNet's map [N, C, h, w], or those of a transformer [N, T, C]. Each block has its own
    permutation of each sample and step.
    """

    uses_base: ClassVar[bool] = False

    blocks: tuple[nn.Module, ...]

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks:
            raise ValueError("blocks: wanted one attention block or more, got none")

    def difference(self, step: Step) -> Tensor:
        def shuffled(number: int, rows: slice, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
            order = sent(step.uniform(tokens.shape[1], TOKENS, number)[rows].argsort(dim=1), x.device)
            tokens = tokens.gather(1, order[:, :, None].expand_as(tokens))
            return tokens.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else tokens

        given = step.conditional
        with altered(*self.blocks, rows=len(given.x_t), before=shuffled):
            return given.eps - step.denoise(given.x_t, given.t, given.condition).eps
