"""guided-diffusion's training in half precision: float32 master copies of the parameters, and a scaled loss.

Master parameters are two tensors: all vectors of the network end to end [n], and all matrices [1, n].
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from . import logger

INITIAL_LOG_LOSS_SCALE = 20.0

Group = list[tuple[str, Tensor]]
"""Parameters by name."""

Groups = list[tuple[Group, int | tuple[int, int]]]
"""Parameters that share a master tensor, and its shape."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, _CONVOLUTIONS):
        module.to(dtype)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741
    """Make a convolution's parameters float16; other modules stay as they are."""
    _convert(l, torch.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Make a convolution's parameters float32; other modules stay as they are."""
    _convert(l, torch.float32)


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, Tensor]]) -> Groups:
    """The parameters cut into vectors (and numbers) and matrices (and more)."""
    named = list(named_model_params)
    vectors = [(name, param) for name, param in named if param.ndim <= 1]
    matrices = [(name, param) for name, param in named if param.ndim > 1]
    return [(vectors, -1), (matrices, (1, -1))]


def _flat(tensors: Iterable[Tensor], shape: int | tuple[int, int]) -> Tensor:
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors]).view(shape)


def make_master_params(param_groups_and_shapes: Groups) -> list[nn.Parameter]:
    """Float32 copies of the parameters, a tensor for each group."""
    return [nn.Parameter(_flat((tensor for _, tensor in group), shape)) for group, shape in param_groups_and_shapes]


def model_grads_to_master_grads(param_groups_and_shapes: Groups, master_params: Sequence[Tensor]) -> None:
    """Copy the gradients of the model to the master parameters."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = _flat((param_grad_or_zeros(param) for _, param in group), shape)


@torch.no_grad()
def master_params_to_model_params(param_groups_and_shapes: Groups, master_params: Iterable[Tensor]) -> None:
    """Copy the master parameters to the model."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (_, param), values in zip(group, unflatten_master_params(group, master.view(-1)), strict=True):
            param.copy_(values)


def unflatten_master_params(param_group: Group, master_param: Tensor) -> list[Tensor]:
    """A master parameter [n] as tensors of the group's shapes."""
    parts = master_param.split([param.numel() for _, param in param_group])
    return [part.view(param.shape) for part, (_, param) in zip(parts, param_group, strict=True)]


def master_params_to_state_dict(
    model: nn.Module, param_groups_and_shapes: Groups | None, master_params: Sequence[Tensor], use_fp16: bool
) -> dict[str, Tensor]:
    """The model's state with the values of the master parameters."""
    if use_fp16:
        named = {
            name: values
            for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True)
            for (name, _), values in zip(group, unflatten_master_params(group, master.view(-1)), strict=True)
        }
    else:
        named = {name: master for (name, _), master in zip(model.named_parameters(), master_params, strict=True)}
    return model.state_dict() | {name: values.detach() for name, values in named.items()}


def state_dict_to_master_params(model: nn.Module, state_dict: dict[str, Tensor], use_fp16: bool) -> list[Tensor]:
    """The master parameters of a state of the model."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    return make_master_params(get_param_groups_and_shapes(named)) if use_fp16 else [values for _, values in named]


def zero_master_grads(master_params: Iterable[Tensor]) -> None:
    """Forget the gradients of the master parameters."""
    for param in master_params:
        param.grad = None


def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Set the gradients that there are to zero, in place."""
    for param in model_params:
        if param.grad is not None:
            param.grad = param.grad.detach().zero_()


def param_grad_or_zeros(param: Tensor) -> Tensor:
    """The gradient of a parameter, zeros if it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def check_overflow(value: float) -> bool:
    """Whether a number is infinite or none."""
    return not math.isfinite(value)


class MixedPrecisionTrainer:
    """Gradient steps of a model, in half precision if `use_fp16`, then with a loss scaled by 2^lg_loss_scale.

    The scale halves where gradients overflow, and grows by `fp16_scale_growth` in its logarithm with every step.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ):
        self.model, self.use_fp16 = model, use_fp16
        self.fp16_scale_growth, self.lg_loss_scale = fp16_scale_growth, initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.master_params: Sequence[Tensor] = self.model_params
        self.param_groups_and_shapes: Groups | None = None
        if use_fp16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            model.convert_to_fp16()

    def zero_grad(self) -> None:
        """Begin a step."""
        zero_grad(self.model_params)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """End a step: update the master parameters, which `opt` holds, and the model; False if a gradient overflowed.

        A FloatingPointError stops a training in float32 before a gradient that is not finite spoils it.
        """
        return self._optimize_fp16(opt) if self.use_fp16 else self._optimize_normal(opt)

    def _optimize_fp16(self, opt: torch.optim.Optimizer) -> bool:
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        scale = 2**self.lg_loss_scale
        grad_norm, param_norm = self._compute_norms(grad_scale=scale)
        fits = not check_overflow(grad_norm)
        if fits:
            self._log_norms(grad_norm, param_norm)
            for param in self.master_params:
                param.grad.div_(scale)
            opt.step()
            master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
            self.lg_loss_scale += self.fp16_scale_growth
        else:
            self.lg_loss_scale -= 1
            logger.log(f"a gradient overflowed; lg_loss_scale is now {self.lg_loss_scale}")
        zero_master_grads(self.master_params)
        return fits

    def _optimize_normal(self, opt: torch.optim.Optimizer) -> bool:
        grad_norm, param_norm = self._compute_norms()
        if check_overflow(grad_norm):
            raise FloatingPointError(f"the gradient's norm is {grad_norm:g}; no parameter was updated with it")
        self._log_norms(grad_norm, param_norm)
        opt.step()
        return True

    def _compute_norms(self, grad_scale: float = 1.0) -> tuple[float, float]:
        """Of the gradients, less their scale, and of the parameters."""
        grads = [param.grad for param in self.master_params if param.grad is not None]
        params = [param.detach() for param in self.master_params]
        return get_total_norm(grads).item() / grad_scale, get_total_norm(params).item()

    @staticmethod
    def _log_norms(grad_norm: float, param_norm: float) -> None:
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's state with the values of (moving averages of) the master parameters."""
        return master_params_to_state_dict(self.model, self.param_groups_and_shapes, master_params, self.use_fp16)

    def state_dict_to_master_params(self, state_dict: dict[str, Tensor]) -> list[Tensor]:
        """The master parameters of a state of the model."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)
