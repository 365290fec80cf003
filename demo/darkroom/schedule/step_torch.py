"""The denoising loop's body in torch: one call of the UNet, guidance and all, and the schedule's step behind it.

What `export.step` writes as a graph for TensorRT stands here as a module, so that a compiler sees the network and the
arithmetic around it as one. It reads and writes the same buffers in every step, and so can be captured in a CUDA graph.
"""

import numpy as np
import torch
from torch import Tensor, nn

from darkroom.schedule.table import OUTPUT_WINDOW, SAMPLE_WINDOW, Table

ROW = 16
"""Numbers in a row of `rows_of`: a multiple of the alignment that compiled kernels count on, with some left over."""

WEIGHTS, BOTH = 3, SAMPLE_WINDOW + OUTPUT_WINDOW
"""Where the weights of the samples begin in a row, those of the outputs behind them; and how many both are."""


def rows_of(table: Table) -> np.ndarray:
    """The table (N, ROW) float32: timestep, input scale, weight of the noise (0 where none is drawn), weights of the
    samples and of the outputs, newest first, and zeros."""
    rows = np.zeros((len(table), ROW), np.float32)
    rows[:, 0] = table.timesteps
    rows[:, 1] = table.input_scale
    rows[:, 2] = np.where(table.noise_drawn, table.noise_weights, 0)
    rows[:, WEIGHTS : WEIGHTS + SAMPLE_WINDOW] = table.sample_weights
    rows[:, WEIGHTS + SAMPLE_WINDOW : WEIGHTS + BOTH] = table.output_weights
    return rows


class LoopStep(nn.Module):
    """Moves the samples one step on, in place. The formula is that of `schedule.table`, in float32."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, row: Tensor, samples: Tensor, outputs: Tensor, noise: Tensor, *conditions: Tensor) -> None:
        """`row` (ROW,) of `rows_of`; `samples` (4, B, C, h, w) and `outputs` (4, B, C, h, w), newest first; `noise`
        (B, C, h, w); `conditions`: what the UNet takes beside latents and timesteps."""
        sample_weights, output_weights = row[WEIGHTS : WEIGHTS + BOTH].split((SAMPLE_WINDOW, OUTPUT_WINDOW))
        newest = self.unet(samples[0] * row[1], row[0].expand(samples.shape[1]), *conditions)
        newer = torch.cat([newest[None], outputs[:-1]])
        following = _weighed(samples, sample_weights) + _weighed(newer, output_weights) + row[2] * noise
        outputs.copy_(newer)
        samples.copy_(torch.cat([following[None], samples[:-1]]))


def _weighed(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights.reshape(-1, 1, 1, 1, 1)).sum(0)
