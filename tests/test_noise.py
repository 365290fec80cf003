"""Noise is what torch draws from a CPU generator, without torch."""

import numpy as np
import pytest
import torch

from darkroom.noise import NoiseStream, initial_latents

SEEDS = [0, 1, 5, 12345, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**53 + 1, 2**63, 2**64 - 1]
SHAPES = [(1,), (7,), (15,), (16,), (17,), (31,), (32,), (4, 5, 5), (4, 8, 8), (4, 9, 7), (4, 64, 64)]


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_equals_torch_randn(seed: int) -> None:
    for shape in SHAPES:
        expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
        found = NoiseStream(seed).normal(shape)
        assert found.dtype == np.float32
        assert found.shape == shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6, err_msg=f"shape {shape}")


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_successive_draws_continue_the_stream_as_torch_does(seed: int) -> None:
    stream, generator = NoiseStream(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in [(4, 8, 8), (3,), (4, 9, 7), (1,), (1,), (15,), (17,), (4, 8, 8)]:
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.normal(shape), expected, rtol=0, atol=2e-6, err_msg=f"shape {shape}")


def test_streams_of_a_batch_do_not_disturb_one_another() -> None:
    streams = [NoiseStream(seed) for seed in (3, 4)]
    first, second = initial_latents(streams, (4, 6, 5)), initial_latents(streams, (4, 6, 5))
    generator = torch.Generator("cpu").manual_seed(4)
    np.testing.assert_allclose(first[1], torch.randn(4, 6, 5, generator=generator).numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(second[1], torch.randn(4, 6, 5, generator=generator).numpy(), rtol=0, atol=2e-6)


def test_noise_is_normal() -> None:
    noise = NoiseStream(11).normal((100_000,)).astype(np.float64)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert np.isfinite(noise).all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        NoiseStream(seed)
