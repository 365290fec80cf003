"""Guidance that shares what it can gives what guidance on a doubled batch gives."""

import copy

import pytest

torch = pytest.importorskip("torch")
from diffusers import UNet2DConditionModel  # noqa: E402

from darkroom.networks.guidance import Guided  # noqa: E402
from darkroom.networks.unet import Unet, share_until_text  # noqa: E402

CROSS_DOWN, DOWN, CROSS_UP, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
SHAPES = {
    "as in Stable Diffusion": ((CROSS_DOWN, CROSS_DOWN, DOWN), (UP, CROSS_UP, CROSS_UP), 2),
    "text in the second block": ((DOWN, CROSS_DOWN, CROSS_DOWN), (CROSS_UP, CROSS_UP, UP), 1),
    "text in the last block": ((DOWN, DOWN, CROSS_DOWN), (CROSS_UP, UP, UP), 2),
    "text on the way up alone": ((DOWN, DOWN, DOWN), (CROSS_UP, UP, UP), 1),
    "samplers that are told the timestep": ((f"Simple{CROSS_DOWN}", DOWN, DOWN), (UP, UP, f"Simple{CROSS_UP}"), 1),
}
NOT_SHARED = ("text on the way up alone", "samplers that are told the timestep")


def unet(down: tuple[str, ...], up: tuple[str, ...], layers: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=layers,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_shared_guidance_equals_doubled_batch(name: str) -> None:
    plain = unet(*SHAPES[name])
    copied = copy.deepcopy(plain)
    guided = Guided(Unet(copied, ("text_embeddings",)), share_until_text(copied))
    assert guided.shares == (name not in NOT_SHARED)
    latents, timestep = torch.randn(3, 4, 8, 16), torch.tensor([3.0, 500.0, 999.0])
    text, negative = torch.randn(2, 3, 77, 32)
    scale = torch.tensor([0.5, 3.0, 7.0])
    with torch.no_grad():
        found = guided(latents, timestep, text, negative, scale)
        expected = [
            plain(latents, timestep, encoder_hidden_states=embeddings).sample for embeddings in (negative, text)
        ]
    expected = expected[0] + scale.clamp(min=1).reshape(-1, 1, 1, 1) * (expected[1] - expected[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
