"""The networks: the architectures of Stable Diffusion 1.x and of SDXL made small."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH = 192
"""Of the text encoder, and so of the UNet's cross-attention."""
TOKENS = 77
"""Prompt length of every Stable Diffusion."""
TEXT_INNER = 1536
"""Width of the text encoder's feed-forward layers: 24 units for each of the 64 places of `train_text`."""
WIDTH_SCENES = 256
"""The same of the 256-pixel model, whose words are three times as many and whose order matters."""
WIDTH_2 = 64
"""Of the second text encoder of the SDXL shape, and of its pooled output."""
SIZE_WIDTH = 16
"""Width of the embedding of each of SDXL's six sizes."""


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


CHANNELS_256 = 32
"""Of the 256-pixel model's latents. With 16 its reconstructions stayed at 26 dB; 32 passed 30 within an hour."""


def vae_256() -> AutoencoderKL:
    """Pictures (B, 3, 256, 256) in -1..1 <-> latents (B, 32, 16, 16).

    Its first four levels are those of `vae`, so that it can be grown from a trained one.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS_256,
        sample_size=256,
        block_out_channels=(16, 32, 64, 128, 256),
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def text_encoder(vocabulary: int, begin: int, end: int, layers: int = 3, width: int = WIDTH) -> CLIPTextModel:
    """Token ids (B, 77) -> hidden states (B, 77, width)."""
    shape = {"hidden_size": width, "intermediate_size": TEXT_INNER, "projection_dim": width}
    shape |= {"num_attention_heads": width // 32, "num_hidden_layers": layers}
    return CLIPTextModel(_text_config(vocabulary, begin, end, **shape))


def text_encoder_2(vocabulary: int, begin: int, end: int) -> CLIPTextModelWithProjection:
    """Token ids (B, 77) -> hidden states (B, 77, WIDTH_2), pooled output (B, WIDTH_2)."""
    shape = {"hidden_size": WIDTH_2, "intermediate_size": 4 * WIDTH_2, "num_attention_heads": 4}
    shape |= {"projection_dim": WIDTH_2, "num_hidden_layers": 3, "hidden_act": "gelu"}
    return CLIPTextModelWithProjection(_text_config(vocabulary, begin, end, **shape))


def _text_config(vocabulary: int, begin: int, end: int, **shape) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=TOKENS,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=end,
        **{"hidden_act": "quick_gelu"} | shape,
    )


def unet(**changed) -> UNet2DConditionModel:
    """Latents (B, 4, 16, 16), timesteps (B,), hidden states (B, 77, WIDTH) -> v (B, 4, 16, 16)."""
    shape = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (64, 144, 224),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": (4, 4, 8),  # the number of heads, in spite of the name
        "norm_num_groups": 16,
    }
    return UNet2DConditionModel(**shape | changed)


def unet_256() -> UNet2DConditionModel:
    """Latents (B, 32, 16, 16), timesteps (B,), hidden states (B, 77, WIDTH_SCENES) -> v (B, 32, 16, 16).

    As many places as in `unet`; a step was measured to take 1.2 to 1.4 times as long.
    """
    wide = {"in_channels": CHANNELS_256, "out_channels": CHANNELS_256, "block_out_channels": (96, 160, 256)}
    return unet(**wide, cross_attention_dim=WIDTH_SCENES)


def unet_xl() -> UNet2DConditionModel:
    """As `unet`, on hidden states (B, 77, WIDTH + WIDTH_2), and told text_embeds (B, WIDTH_2), time_ids (B, 6).

    It has no middle block: the smallest levels of a UNet do without (Kim et al. 2023, https://arxiv.org/abs/2305.15798),
    and the repository has room for a hundred megabytes of weights.
    """
    return unet(
        mid_block_type=None,
        cross_attention_dim=WIDTH + WIDTH_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=6 * SIZE_WIDTH + WIDTH_2,
    )
