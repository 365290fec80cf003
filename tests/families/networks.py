"""The stranger's own networks: a small transformer that predicts velocity, and how its text is joined."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from darkroom.contract import Stage
from darkroom.networks.guidance import Guided


class Block(nn.Module):
    """Attention over text and picture together, and a feed-forward layer, both scaled by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 4 * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        scale, gate, scale_inner, gate_inner = self.modulation(time)[:, None].chunk(4, dim=-1)
        batch, count, width = tokens.shape
        mixed = self.qkv(self.norms[0](tokens) * (1 + scale)).reshape(batch, count, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        attended = (weights @ value).transpose(1, 2).reshape(batch, count, width)
        tokens = tokens + (1 + gate) * self.out(attended)
        return tokens + (1 + gate_inner) * self.inner(self.norms[1](tokens) * (1 + scale_inner))


class StrangerTransformer(ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), time (B,) from 0 to 1 and text (B, L, D) -> velocity (B, C, h, w)."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        width: int = 48,
        heads: int = 3,
        layers: int = 2,
        text_width: int = 40,
        sample_size: int = 8,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, 2, stride=2)
        self.places = nn.Conv2d(width, width, 3, padding=1, groups=width)  # where a token lies, whatever the size
        self.text = nn.Linear(text_width, width)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 4 * in_channels)

    def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        batch, channels, height, width = latents.shape
        rates = torch.exp(-torch.arange(16, device=latents.device, dtype=torch.float32) * 0.5)
        angles = 1000 * time.float()[:, None] * rates
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(latents.dtype))
        patches = self.patches(latents)
        patches = patches + self.places(patches)
        tokens = torch.cat([self.text(text), patches.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            tokens = block(tokens, embedded)
        made = self.pixels(self.norm(tokens[:, text.shape[1] :]))
        made = made.reshape(batch, height // 2, width // 2, 2, 2, channels)
        return made.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def joined(words: Tensor, sentences: Tensor) -> Tensor:
    """(B, L1, D1) and (B, L2, D2) -> (B, L1 + L2, D2): one after the other, the narrower filled up with zeros."""
    return torch.cat([nn.functional.pad(words, (0, sentences.shape[-1] - words.shape[-1])), sentences], dim=1)


class Velocity(nn.Module):
    """The denoiser's stage: timesteps from 0 to 1000."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, timestep: Tensor, words: Tensor, sentences: Tensor) -> Tensor:
        dtype = self.network.dtype
        return self.network(latents.to(dtype), timestep / 1000, joined(words, sentences).to(dtype)).float()


def velocity(stage: Stage, network: nn.Module) -> nn.Module:
    return Guided(Velocity(network)) if stage.options["guided"] else Velocity(network)


class Reader(nn.Module):
    """A text encoder's stage: its last hidden states."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.network(input_ids=input_ids.long()).last_hidden_state.float()


def reader(stage: Stage, network: nn.Module) -> nn.Module:
    return Reader(network)
