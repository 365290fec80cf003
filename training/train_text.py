"""Train the text encoder to hold the picture: it regresses the latents before any UNet exists.

    python -m training.train_text [--work FOLDER] [--minutes 10] [--resume] [--device cuda]

A small UNet trained together with a fresh text encoder spends most of its time waiting for the words to mean
something. Here the last 64 of the 77 positions (padding; being causal, each has seen the whole caption) each
predict one 2x2 patch of the latents through a linear head that is thrown away. What remains is an encoder whose
hidden states say, position by position, what goes where; the UNet's cross-attention has only to read it.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from training import networks
from training.latents import Cache
from training.loop import Plan, Trainer
from training.networks import TOKENS, WIDTH
from training.tokenizer import Encoder
from training.workspace import add_training_arguments

SIDE, PATCH = 8, 2
"""8 x 8 patches of 2 x 2 latents."""


def place_codes() -> Tensor:
    """Smooth two-dimensional position codes for the 64 registers: (64, WIDTH).

    Neighbours in the picture start alike, so attention over places can be learned coarse to fine.
    """
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    waves = torch.cat([f(math.pi * k * axis)[None] for k in range(1, 7) for f in (torch.sin, torch.cos)])
    rows, columns = waves[:, :, None].expand(-1, SIDE, SIDE), waves[:, None, :].expand(-1, SIDE, SIDE)
    codes = torch.cat([rows, columns, rows[:4] * columns[:4]]).flatten(1).T
    return torch.cat([codes, torch.zeros(SIDE * SIDE, WIDTH - codes.shape[1])], dim=1)


class Regressor(nn.Module):
    """The text encoder with the head that predicts latents from it."""

    def __init__(self, tokens: Encoder) -> None:
        super().__init__()
        self.text = networks.text_encoder(tokens.tokenizer.get_vocab_size(), tokens.begin, tokens.end)
        self.head = nn.Linear(WIDTH, 4 * PATCH * PATCH)
        with torch.no_grad():
            self.text.get_parameter(self._position_name()).data[TOKENS - SIDE * SIDE :] += 0.1 * place_codes()

    def _position_name(self) -> str:
        return next(name for name, _ in self.text.named_parameters() if "position_embedding" in name)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, 77) -> predicted latents (B, 4, 16, 16)."""
        hidden = self.text(input_ids=ids).last_hidden_state[:, TOKENS - SIDE * SIDE :]
        patches = self.head(hidden).reshape(len(ids), SIDE, SIDE, 4, PATCH, PATCH)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(ids), 4, SIDE * PATCH, SIDE * PATCH)


def main() -> None:
    """Train and keep `text.pt` in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = add_training_arguments(parser, 10, 64, 1.5e-3).parse_args()
    torch.manual_seed(args.seed)
    tokens, cache = Encoder(args.work / "tokenizer"), Cache.load(args.work)
    model = Regressor(tokens).to(args.device)
    trainer = Trainer(model, Plan.of(args, average=0.99), args.work / "text.pt")
    if args.resume:
        trainer.load()

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        texts, latents = cache.draw(args.batch, generator)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            predicted = model(torch.tensor(tokens(texts), device=args.device))
        return (predicted.float() - latents.to(args.device)).square().mean()

    trainer.run(loss)


if __name__ == "__main__":
    main()
