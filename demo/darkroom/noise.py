"""Seed -> normal noise, equal to what `torch.randn` draws from a CPU generator with that seed, without torch.

torch's CPU generator is MT19937 seeded with the low 32 bits of the seed. Sixteen or more float32 normals are
drawn by filling the output with 24-bit uniforms and applying Box-Muller to blocks of 16: the first eight
uniforms of a block give radii, the last eight angles; cosines come first, then sines. A tail that does not fill
a block redraws the last 16 values. Fewer than sixteen are drawn one by one in double precision, two at a time,
the second kept for the next call (ATen/native/cpu/DistributionTemplates.h, ATen/core/DistributionsHelper.h).
"""

import numpy as np

SEED_LIMIT = 2**64
"""Seeds are 64-bit and unsigned, as `torch.Generator.manual_seed` takes them."""

BLOCK = 16


class NoiseStream:
    """The random stream of one image. Successive draws continue it, as calls on one `torch.Generator` do."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(f"a seed is from 0 to {SEED_LIMIT - 1}, not {seed}")
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draws standard normal noise of `shape`, float32: `torch.randn(shape, generator=generator)`."""
        size = int(np.prod(shape))
        flat = self._scalars(size) if size < BLOCK else self._blocks(size)
        return flat.reshape(shape)

    def _words(self, count: int) -> np.ndarray:
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)

    def _uniforms(self, count: int) -> np.ndarray:
        return (self._words(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _blocks(self, size: int) -> np.ndarray:
        uniforms = self._uniforms(size)
        whole = size - size % BLOCK
        normals = np.empty(size, np.float32)
        normals[:whole] = _box_muller(uniforms[:whole])
        if whole != size:
            normals[-BLOCK:] = _box_muller(self._uniforms(BLOCK))
        return normals

    def _scalars(self, size: int) -> np.ndarray:
        return np.array([self._scalar() for _ in range(size)], np.float32)

    def _scalar(self) -> float:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        high_1, low_1, high_2, low_2 = (int(word) for word in self._words(4))
        angle = ((high_1 << 32 | low_1) & (2**53 - 1)) * 2.0**-53 * 2.0 * np.pi
        radius = np.sqrt(-2.0 * np.log1p(-(((high_2 << 32 | low_2) & (2**53 - 1)) * 2.0**-53)))
        self._kept = float(radius * np.sin(angle))
        return float(radius * np.cos(angle))


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Turns uniforms in [0, 1), a multiple of 16 of them, into normals, block by block."""
    blocks = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * np.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def initial_latents(streams: list[NoiseStream], shape: tuple[int, ...]) -> np.ndarray:
    """One draw of `shape` from each stream: (B, *shape) float32, image i from stream i alone."""
    return np.stack([stream.normal(shape) for stream in streams])
