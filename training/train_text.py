"""Train the text encoder to hold the picture: it regresses the latents before any UNet exists.

    python -m training.train_text [--work FOLDER] [--scenes] [--minutes 30] [--resume] [--device cuda]

A small UNet trained together with a fresh text encoder spends most of its time waiting for the words to mean
something. Here the last 64 of the 77 positions (padding; being causal, each has seen the whole caption) each
predict one 2x2 patch of the latents through a linear head that is thrown away. What remains is an encoder whose
hidden states say, position by position, what goes where; the UNet's cross-attention has only to read it.

1,527 pictures are nearly a sum of a mean (of their style and background) and a hundred principal components, so
what has to be learned is small: a code from the words, and for every place its own linear reading of that code.
Plain layers share their weights between places and find such readings slowly; so each place starts with a
code of its own, and the last feed-forward layer starts as a set of experts, some units for each place.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from training import networks
from training.loop import Plan, Trainer
from training.networks import CHANNELS_256, TOKENS, WIDTH, WIDTH_SCENES
from training.scene_latents import load_cache
from training.tokenizer import Encoder
from training.workspace import add_scenes_argument, add_training_arguments

SIDE, PATCH = 8, 2
"""8 x 8 patches of 2 x 2 latents."""
PLACE, PLACE_SEEN = 8.0, 8.0
"""Length of a place's code in the residual stream, and of what the layer norm before the experts makes of it."""
OPEN, SHUT = 2.0, 5.0
"""Input of an expert's units at its own place, and (negated) at all others: quick GELU passes and stops them."""


def place_codes() -> tuple[Tensor, Tensor]:
    """A code of length 1 for each place, and what reads it: (64, 64) twice, `readers @ codes.T` being the identity.

    The codes are the two-dimensional cosine transform's, low frequencies strongest, so that neighbours look
    alike and the UNet's cross-attention can learn its places coarse to fine.
    """
    axis = torch.arange(SIDE)
    cosine = torch.cos(math.pi * axis * (axis[:, None] + 0.5) / SIDE) * math.sqrt(2 / SIDE)
    cosine[:, 0] /= math.sqrt(2)
    basis = torch.kron(cosine, cosine)
    strength = 1 / (1 + axis[:, None] + axis).flatten()
    lengths = (basis * strength).norm(dim=1, keepdim=True)
    return basis * strength / lengths, basis / strength * lengths


class Regressor(nn.Module):
    """The text encoder with the head that predicts latents from it; `scenes`: those of the 256-pixel model."""

    def __init__(self, tokens: Encoder, scenes: bool = False) -> None:
        super().__init__()
        layers, width, self.channels = (4, WIDTH_SCENES, CHANNELS_256) if scenes else (3, WIDTH, 4)
        size = tokens.tokenizer.get_vocab_size()
        self.text = networks.text_encoder(size, tokens.begin, tokens.end, layers, width)
        self.head = nn.Linear(width, self.channels * PATCH * PATCH)
        self._separate_places()

    @torch.no_grad()
    def _separate_places(self) -> None:
        """Start with one code and one group of units in the last feed-forward layer for each place."""
        codes, readers = place_codes()
        places = len(codes)
        self.text.embeddings.position_embedding.weight[TOKENS - places :, :places] += PLACE * codes
        experts = self.text.encoder.layers[-1].mlp.fc1
        experts.weight[:, :places] = readers.repeat_interleave(experts.out_features // places, 0)
        experts.weight[:, :places] *= (OPEN + SHUT) / PLACE_SEEN
        experts.bias[:] = -SHUT

    def encode(self, ids: Tensor) -> tuple[Tensor]:
        """ids (B, 77) -> what the UNet reads: hidden states (B, 77, WIDTH)."""
        return (self.text(input_ids=ids).last_hidden_state,)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, 77) -> predicted latents (B, C, 16, 16)."""
        hidden = self.encode(ids)[0][:, TOKENS - SIDE * SIDE :]
        patches = self.head(hidden).reshape(len(ids), SIDE, SIDE, self.channels, PATCH, PATCH)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(ids), self.channels, SIDE * PATCH, SIDE * PATCH)


def main() -> None:
    """Train and keep `text.pt` in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = add_scenes_argument(add_training_arguments(parser, 30, 64, 1.5e-3)).parse_args()
    torch.manual_seed(args.seed)
    tokens, cache = Encoder(args.work / "tokenizer"), load_cache(args.work, args.scenes)
    model = Regressor(tokens, args.scenes).to(args.device)
    trainer = Trainer(model, Plan.of(args, average=0.99), args.work / "text.pt")
    if args.resume:
        trainer.load()

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        texts, _, expected = cache.draw(args.batch, generator)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16 or args.device != "cpu"):
            predicted = model(torch.tensor(tokens(texts), device=args.device))
        return (predicted.float() - expected.to(args.device)).square().mean()

    trainer.run(loss)


if __name__ == "__main__":
    main()
