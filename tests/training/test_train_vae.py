"""The 256-pixel autoencoder grows from the 128-pixel one, and is trained on windows of the artwork."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL  # noqa: E402

from training import networks, train_vae  # noqa: E402
from training.export import OUTPUT  # noqa: E402
from training.grow import Elder, grow  # noqa: E402
from training.loop import averaged  # noqa: E402


def rgba(count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    made = np.zeros((count, 256, 256, 4), np.uint8)
    for picture in made:
        picture[40:200, 60:220] = (*rng.integers(0, 256, 3), 255)
    return made


def test_the_grown_one_has_the_elders_outer_levels_and_its_own_deepest() -> None:
    elder = AutoencoderKL.from_pretrained(OUTPUT / "vae", dtype=torch.float32)
    vae = networks.vae_256()
    grow(elder, vae)
    torch.testing.assert_close(vae.encoder.conv_in.weight, elder.encoder.conv_in.weight)
    for old, new in zip(elder.decoder.up_blocks[1:], vae.decoder.up_blocks[2:], strict=True):
        for name, weight in old.state_dict().items():
            torch.testing.assert_close(new.state_dict()[name], weight)
    features = torch.randn(1, 128, 8, 8)
    wide = torch.cat([features, torch.randn(1, 128, 8, 8)], 1)
    block = vae.decoder.up_blocks[1].resnets[0]
    torch.testing.assert_close(block.conv_shortcut(wide), features)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, networks.CHANNELS_256, 4, 4)


def test_imitation_is_perfect_for_the_elders_own_code() -> None:
    elder = Elder(AutoencoderKL.from_pretrained(OUTPUT / "vae", dtype=torch.float32))
    vae, picture = networks.vae_256(), torch.rand(1, 3, 64, 64) * 2 - 1
    latents = elder.vae.encode(picture).latent_dist.mean
    packed = torch.nn.functional.pixel_unshuffle(latents, 2)
    packed = torch.nn.functional.pad(packed, (0, 0, 0, 0, 0, networks.CHANNELS_256 - packed.shape[1]))
    near, far = (elder.distance(vae, picture, code).item() for code in (packed, packed.flip(1)))
    assert near < far


def test_windows_are_drawn_from_the_generator_alone_and_hold_something() -> None:
    pictures = train_vae.Pictures(rgba(), "cpu")
    first, second = (pictures.batch(6, 64, torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first, second) and first.shape == (6, 3, 64, 64)
    assert first.min() >= -1 and first.max() <= 1
    assert (first.std(dim=(2, 3)).amax(1) > 0.01).any()


def test_shrinking_keeps_colours_at_the_rim() -> None:
    picture = torch.from_numpy(rgba(1)[0]).permute(2, 0, 1).float() / 255
    small = train_vae.shrink(picture, 100)
    drawn = small[:3][:, small[3] > 0.3]
    assert (drawn - picture[:3, 100, 100][:, None]).abs().max() < 0.02


def test_steps_lower_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = train_vae.start(networks.vae_256())
    picture = train_vae.Pictures(rgba(), "cpu").batch(2, 64, torch.Generator().manual_seed(1))
    optimizer, losses = torch.optim.AdamW(vae.parameters(), 1e-3), []
    for _ in range(8):
        loss, mean = train_vae.loss_of(vae, picture, torch.zeros(2, networks.CHANNELS_256, 4, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert mean.shape == (2, networks.CHANNELS_256, 4, 4) and losses[-1] < losses[0]


def test_decoder_alone_is_trained_on_the_same_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "artwork.npy", rgba())
    flags = ["train_vae", "--work", str(tmp_path), "--batch", "1", "--crop", "32"]
    monkeypatch.setattr("sys.argv", [*flags, "--steps", "1"])
    train_vae.main()
    monkeypatch.setattr("sys.argv", [*flags, "--steps", "2", "--decoder-only"])
    train_vae.main()
    before, after = averaged(tmp_path / "vae.pt"), averaged(tmp_path / "decoder.pt")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
