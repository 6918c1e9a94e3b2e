"""The optimisers: AdamW, and Muon beside it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from dcdit.training.optimizer_settings import AdamW, Muon, OptimizerSettings


def _adamw_arguments(settings: OptimizerSettings, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The arguments of torch's AdamW: a group for each part, with its learning rate."""
    scale = settings.lr_scale or {}
    groups = [
        {"params": list(part.parameters()), "lr": settings.lr * scale.get(name, 1.0)} for name, part in parts.items()
    ]
    common = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    return {"params": groups, **common, "fused": True}


def build_adamw(settings: AdamW, parts: Mapping[str, nn.Module]) -> torch.optim.AdamW:
    """Fused AdamW of all parameters of ``parts``."""
    return torch.optim.AdamW(**_adamw_arguments(settings, parts))


def build_muon(settings: Muon, parts: Mapping[str, nn.Module]) -> "MuonWithAdamW":
    """Muon of the matrices of transformer blocks in ``parts``, fused AdamW of all their other parameters."""
    matrices = {weight: count for part in parts.values() for weight, count in settings.matrices(part).items()}
    # As large a step as AdamW's, so that one learning rate and weight decay serve both (arXiv 2502.16982).
    muon = {"adjust_lr_fn": "match_rms_adamw", "momentum": settings.momentum, "nesterov": settings.nesterov}
    return MuonWithAdamW(matrices, {**muon, "ns_steps": settings.ns_steps}, _adamw_arguments(settings, parts))


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW that leaves some weights to :class:`torch.optim.Muon`; one optimiser for Lightning and for checkpoints.

    Matrices that are stacked in one weight are orthogonalised each by itself (CMuon, arXiv 2608.02502). A step with
    ``found_inf`` 1, which the module sets where gradients are not finite, leaves weights and momentum as they are, bit
    for bit, and reads nothing from a GPU.

    Args:
        matrices: the weights of Muon, each with the number of matrices stacked in it.
        muon: arguments of Muon; learning rate and weight decay are those of a weight's group.
        adamw: arguments of AdamW, with the groups of all parameters.
    """

    def __init__(self, matrices: Mapping[nn.Parameter, int], muon: Mapping[str, Any], adamw: Mapping[str, Any]) -> None:
        super().__init__(**adamw)
        self.matrices, self.muon = dict(matrices), dict(muon)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both. The closure, which computes the gradients, may set ``found_inf``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {weight: weight.grad for weight in self.matrices}
        for weight in gradients:
            weight.grad = None  # which AdamW passes over
        super().step()
        for weight, gradient in gradients.items():
            weight.grad = gradient
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = gradients.get(weight)
                if gradient is not None:
                    self._step_matrix(weight, gradient, group)
        return loss

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        # That of AdamW, which mends states of old releases of torch, expects its own state of every parameter.
        torch.optim.Optimizer.__setstate__(self, state)

    def _step_matrix(self, weight: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        changed = weight.detach(), state["momentum_buffer"]
        # As AdamW takes them: of a gradient scaler, or the module's.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        gradient = gradient if scale is None else gradient / scale
        before = [] if found_inf is None else [tensor.clone() for tensor in changed]
        # torch.optim.Muon takes whole parameters, so each matrix becomes one, in the memory that it has.
        matrices, momenta, gradients = (
            tensor.split(len(weight) // self.matrices[weight]) for tensor in (*changed, gradient)
        )
        parameters = [nn.Parameter(matrix) for matrix in matrices]
        muon = torch.optim.Muon(parameters, lr=group["lr"], weight_decay=group["weight_decay"], **self.muon)
        for parameter, momentum, part in zip(parameters, momenta, gradients, strict=True):
            parameter.grad, muon.state[parameter] = part, {"momentum_buffer": momentum}
        muon.step()
        if found_inf is not None:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(found_inf.bool(), old, tensor))
