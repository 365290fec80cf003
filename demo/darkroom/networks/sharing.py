"""Classifier-free guidance with less work: what stands before the first cross-attention is computed once.

Both halves of guidance have the same latents and the same timestep; only at the first cross-attention, where the
text comes in, do they part. Until then a UNet can run on B images instead of 2B, to the same result.
"""

from typing import Any

import torch
from torch import Tensor, nn

SHAREABLE = {
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
    "AttnUpBlock2D",
}
"""The kinds of blocks whose resnets alone are told the timestep. In others, samplers or attentions are told it too."""


def share_until_text(unet: nn.Module) -> bool:
    """Makes diffusers' `UNet2DConditionModel` take latents and timesteps of B images with the text of 2B.

    Returns False, and leaves it as it is, where the halves differ from the start (SDXL's added conditions), where a
    block is not one of SHAREABLE, or where no down block holds cross-attention.
    """
    if unet.config.addition_embed_type or unet.config.class_embed_type:
        return False
    if not SHAREABLE.issuperset([*unet.config.down_block_types, *unet.config.up_block_types]):
        return False
    blocks = list(unet.down_blocks)
    parting = next((index for index, block in enumerate(blocks) if _has_attention(block)), None)
    if parting is None:
        return False
    blocks[parting].attentions[0].register_forward_pre_hook(_double_hidden)
    later = [*blocks[parting].resnets[1:]]
    for block in (*blocks[parting + 1 :], *filter(None, [unet.mid_block]), *unet.up_blocks):
        later += block.resnets
    for resnet in later:
        resnet.register_forward_pre_hook(_double_time)
    # The up blocks take the skip connections from the end of the list; its first ones are of B images.
    shared = 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in blocks[:parting])
    left = 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in blocks)
    for block in unet.up_blocks:
        left -= len(block.resnets)
        block.register_forward_pre_hook(_double_skips(max(0, shared - left)), with_kwargs=True)
    return True


def _has_attention(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def _double_hidden(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_twice(arguments[0]), *arguments[1:])


def _double_time(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, time, *rest = arguments
    return (hidden, _twice(time), *rest)


def _double_skips(count: int) -> Any:
    """A hook that doubles the first `count` skip connections that an up block is given."""

    def hook(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        skips = named["res_hidden_states_tuple"]
        return arguments, named | {"res_hidden_states_tuple": (*map(_twice, skips[:count]), *skips[count:])}

    return hook
