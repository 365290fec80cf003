"""Stable Diffusion's and SDXL's UNet: one call for a batch, with guidance inside.

Classifier-free guidance takes less work than two calls: both halves have the same latents and the same timestep, and
part at the first cross-attention, where the text comes in. Until then a UNet can run on B images instead of 2B, to the
same result.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.contract import (
    COMMON,
    CONTROL_FROM,
    CONTROL_SCALES,
    CONTROL_UNTIL,
    CONTROLS,
    GUIDANCE_SCALE,
    MASK,
    MASKED,
    NEGATIVE,
    Stage,
)
from darkroom.networks.guidance import Guided

SHAREABLE = {
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
    "AttnUpBlock2D",
}
"""The kinds of blocks whose resnets alone take the timestep. In others, samplers or attentions take it too."""


def denoiser(stage: Stage, network: nn.Module, *controlnets: nn.Module) -> nn.Module:
    """The module of a UNet's stage, with ControlNets or without."""
    if network.config.time_cond_proj_dim is not None or not stage.options["guided"]:
        return Unet(network, stage.steady, controlnets)
    own = tuple(name for name in stage.steady if not name.startswith(NEGATIVE) and name != GUIDANCE_SCALE.name)
    common = sum(name in COMMON for name in own)
    # A ControlNet's answers differ from the start, for it is given the text, too.
    shares = not controlnets and share_until_text(network)
    return Guided(Unet(network, own, controlnets), shares, common)


class Unet(nn.Module):
    """One network call: the output for each image at its own timestep.

    `conditions` names what it takes beside latents and timestep: the embeddings of one text encoder or two, which stand
    side by side, (B, T, D) each; for SDXL pooled_embeddings (B, P) and time_ids (B, 6 or 5); and guidance_scale (B,)
    where the UNet was distilled to follow a scale that it is given (Meng et al. 2022). Where it was trained to inpaint,
    mask (B, 1, h, w) and masked_latents (B, C, h, w) are channels behind those of the latents.

    Each of the `controlnets` is shown what the UNet is, and its map; its answers are multiplied by its scale, by 0
    outside of its timesteps, and added to what the UNet's second half is given (Zhang et al. 2023).
    """

    def __init__(self, unet: nn.Module, conditions: tuple[str, ...], controlnets: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.unet = unet
        self.controlnets = nn.ModuleList(controlnets)
        self.conditions = conditions
        self.dtype = unet.conv_in.bias.dtype  # of what is computed; large weights may be kept in another
        self.levels = len(unet.config.block_out_channels)

    def forward(self, latents: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        given = dict(zip(self.conditions, conditions, strict=True))
        texts = [given[name].to(self.dtype) for name in self.conditions if name.startswith("text_embeddings")]
        added = {}
        if "time_ids" in given:
            added = {
                "text_embeds": given["pooled_embeddings"].to(self.dtype),
                "time_ids": given["time_ids"].to(self.dtype),
            }
        scale = given.get(GUIDANCE_SCALE.name)
        shown = [latents, *(given[name] for name in (MASK, MASKED) if name in given)]
        text = torch.cat(texts, dim=-1) if len(texts) > 1 else texts[0]
        answers = [
            self._answer(which, latents.to(self.dtype), timestep, text, added, given)
            for which in range(len(self.controlnets))
        ]
        beside: dict[str, Any] = {}
        if answers:
            down, middle = zip(*answers, strict=True)
            beside = {
                "down_block_additional_residuals": tuple(sum(each) for each in zip(*down, strict=True)),
                "mid_block_additional_residual": sum(middle),
            }
        output = self.unet(
            torch.cat(shown, dim=1).to(self.dtype) if len(shown) > 1 else latents.to(self.dtype),
            timestep,
            encoder_hidden_states=text,
            timestep_cond=None if scale is None else self._embedded(scale).to(self.dtype),
            added_cond_kwargs=added or None,
            **beside,
        )
        return output.sample.float()

    def _answer(
        self,
        which: int,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        added: dict[str, Tensor],
        given: dict[str, Tensor],
    ) -> tuple[list[Tensor], Tensor]:
        """What a ControlNet adds at the end of each resnet of the first half, and in the middle."""
        within = (timestep <= given[CONTROL_FROM][:, which]) & (timestep >= given[CONTROL_UNTIL][:, which])
        scale = (given[CONTROL_SCALES][:, which] * within).to(self.dtype).reshape(-1, 1, 1, 1)
        down, middle = self.controlnets[which](
            latents,
            timestep,
            encoder_hidden_states=text,
            controlnet_cond=given[CONTROLS[which]].to(self.dtype),
            added_cond_kwargs=added or None,
            return_dict=False,
        )
        return [each * scale for each in down], middle * scale

    def _embedded(self, guidance_scale: Tensor) -> Tensor:
        """The scale as diffusers embeds it: sines and cosines of 1000 times what it is above 1."""
        half = self.unet.config.time_cond_proj_dim // 2
        index = torch.arange(half, device=guidance_scale.device)
        frequencies = torch.exp(index * (-math.log(10000) / (half - 1)))
        angles = 1000 * (guidance_scale - 1)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


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
