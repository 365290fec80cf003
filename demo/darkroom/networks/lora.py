"""LoRA files and their relatives fused into a network's weights: W + strength * scaling * difference.

The formulas: LoRA (Hu et al. 2021), up @ down, also of convolutions (LoCon); LoHa (Hyeon-Woo et al. 2022), (a1 @ b1) *
(a2 @ b2); LoKr (Yeh et al. 2024), the Kronecker product of two factors; DoRA (Liu et al. 2024), the sum with its rows
brought to learned lengths; and whole differences. Convolutions may be in LyCORIS's Tucker form: a core between factors.
"""

import torch
from safetensors import safe_open
from torch import Tensor, nn

from darkroom.checkpoint.lora import Change, changes
from darkroom.contract import Lora
from darkroom.errors import InvalidRequest


def fuse(network: nn.Module, part: str, lora: Lora) -> None:
    """Changes `network`, which is `part` of a model, by what the LoRA holds for it; computed in float32.

    Raises `InvalidRequest` where the LoRA was made for another model, or holds what is no number.
    """
    if not lora.strength:
        return
    weights = dict(network.named_parameters())
    sizes = {name: list(weight.shape) for name, weight in weights.items()}
    found, _ = changes(lora.path, part, sizes, network.config)
    with safe_open(lora.path, "pt") as file, torch.no_grad():
        for change in found:
            tensors = {kind: file.get_tensor(name).float() for kind, name in change.tensors.items()}
            for kind, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise InvalidRequest(
                        f"the LoRA {lora.path} holds NaN or infinity in {change.tensors[kind]}: its weights are "
                        f"damaged; fetch it again, or use another."
                    )
            _fuse_layer(weights, change, tensors, lora.strength)


def _fuse_layer(weights: dict[str, nn.Parameter], change: Change, tensors: dict[str, Tensor], strength: float) -> None:
    difference, rank = _difference(tensors)
    scaling = change.scaling if change.scaling is not None else 1.0
    if rank and "alpha" in tensors:
        scaling = tensors["alpha"].item() / rank
    if difference is not None:
        weight = weights[f"{change.layer}.weight"]
        made = weight.float() + strength * scaling * change.rows(difference).reshape(weight.shape)
        if "lora_magnitude_vector" in tensors:
            made = _of_length(made, change.rows(tensors["lora_magnitude_vector"].flatten()), 0)
        if (lengths := tensors.get("dora_scale")) is not None:
            of_columns = lengths.ndim > 1 and lengths.shape[0] == 1 and lengths.shape[1] == weight.shape[1]
            made = _of_length(made, lengths if of_columns else change.rows(lengths.flatten()), int(of_columns))
        weight.copy_(made)
    for kind, factor in (("up_bias", scaling), ("diff_b", 1.0)):
        if kind in tensors:
            bias = weights[f"{change.layer}.bias"]
            bias.copy_(bias.float() + strength * factor * change.rows(tensors[kind].flatten()))


def _of_length(weight: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """The weight with its slices along `axis` (0: outputs, 1: inputs) brought to these Euclidean lengths."""
    slices = weight.transpose(0, axis)
    factors = lengths.flatten() / slices.flatten(1).norm(dim=1)
    return (slices * factors.reshape(-1, *[1] * (weight.ndim - 1))).transpose(0, axis)


def _difference(tensors: dict[str, Tensor]) -> tuple[Tensor | None, int | None]:
    """What a layer's tensors add to its weight, before any scaling; and the rank that its alpha is divided by, None
    where alpha has no meaning."""

    def factor(name: str, core: str) -> tuple[Tensor, int | None]:
        if name in tensors:
            return tensors[name], None
        return _product(tensors[f"{name}_a"], tensors[f"{name}_b"], tensors.get(core)), len(tensors[f"{name}_b"])

    if "diff" in tensors:
        return tensors["diff"], None
    if "up" in tensors:
        up, down, mid = tensors["up"].flatten(1), tensors["down"], tensors.get("mid")
        return _product(up if mid is None else up.T, down, mid), len(down)
    if "hada_w1_a" in tensors:
        (first, rank), (second, _) = factor("hada_w1", "hada_t1"), factor("hada_w2", "hada_t2")
        return first * second, rank
    if "lokr_w2" in tensors or "lokr_w2_a" in tensors:
        (first, rank), (second, other) = factor("lokr_w1", ""), factor("lokr_w2", "lokr_t2")
        first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
        return torch.kron(first, second.contiguous()), other or rank
    return None, None


def _product(left: Tensor, right: Tensor, core: Tensor | None) -> Tensor:
    """left (out, r) @ right (r, in, ...); with a core (r, s, ...) between left (r, out) and right (s, in)."""
    if core is None:
        return left.flatten(1) @ right.flatten(1)
    return torch.einsum("rs...,ro,si->oi...", core, left.flatten(1), right.flatten(1))
