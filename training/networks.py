"""The networks, the architectures of Stable Diffusion 1.x made small."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 192
"""Of the text encoder, and so of the UNet's cross-attention."""
TOKENS = 77
"""Prompt length of every Stable Diffusion."""
TEXT_INNER = 1536
"""Width of the text encoder's feed-forward layers: 24 units for each of the 64 places of `train_text`."""


def vae() -> AutoencoderKL:
    """Pictures (B, 3, 128, 128) in -1..1 <-> latents (B, 4, 16, 16)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=128,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def text_encoder(vocabulary: int, begin: int, end: int) -> CLIPTextModel:
    """Token ids (B, 77) -> hidden states (B, 77, WIDTH)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=TEXT_INNER,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def unet() -> UNet2DConditionModel:
    """Latents (B, 4, 16, 16), timesteps (B,), hidden states (B, 77, WIDTH) -> v (B, 4, 16, 16)."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 144, 224),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(4, 4, 8),  # the number of heads, in spite of the name
        norm_num_groups=16,
    )
