"""Make the two text encoders of the SDXL shape.

    python -m training.train_text_xl [--work FOLDER] [--minutes 8] [--resume] [--device cuda]

The first is the one that `train_text` made with a layer more at its end, never read: SDXL takes the hidden states
of the layer before the last, and without the final norm. It learns to say there what the other says after its norm.
The second is small; its pooled output, the whole caption in one vector, learns to tell the picture through a linear
head that is thrown away, as the places of the first did.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from training import networks
from training.latents import Cache
from training.loop import Plan, Trainer, averaged
from training.networks import WIDTH_2
from training.tokenizer import Encoder
from training.train_unet import load_text
from training.workspace import add_training_arguments

LAYERS = 4
"""Of the first: the three that are read, and the last."""
POOLED_WEIGHT = 0.1


class TextEncoders(nn.Module):
    """Both text encoders, and the head over the second's pooled output."""

    def __init__(self, tokens: Encoder) -> None:
        super().__init__()
        vocabulary = tokens.tokenizer.get_vocab_size(), tokens.begin, tokens.end
        self.first = networks.text_encoder(*vocabulary, layers=LAYERS)
        self.second = networks.text_encoder_2(*vocabulary)
        self.head = nn.Linear(WIDTH_2, 4 * 16 * 16)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, 77) -> hidden states of both side by side (B, 77, WIDTH + WIDTH_2), pooled output (B, WIDTH_2)."""
        first = self.first(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(input_ids=ids, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds

    def picture(self, pooled: Tensor) -> Tensor:
        """What the head reads from pooled outputs: latents (B, 4, 16, 16)."""
        return self.head(pooled).reshape(-1, 4, 16, 16)


def load_encoders(work: Path, tokens: Encoder, device: str) -> TextEncoders:
    """The trained encoders."""
    made = TextEncoders(tokens).eval()
    made.load_state_dict(averaged(work / "text_xl.pt"))
    return made.to(device)


def main() -> None:
    """Train and keep `text_xl.pt` in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = add_training_arguments(parser, 8, 64, 1e-3).parse_args()
    torch.manual_seed(args.seed)
    tokens, cache = Encoder(args.work / "tokenizer"), Cache.load(args.work)
    teacher = load_text(args.work, tokens, args.device)
    model = TextEncoders(tokens)
    model.first.load_state_dict(teacher.text.state_dict(), strict=False)  # but for the last layer
    for unread in (model.first.encoder.layers[-1], model.first.final_layer_norm):
        unread.requires_grad_(False)
    trainer = Trainer(model.to(args.device), Plan.of(args, average=0.99), args.work / "text_xl.pt")
    if args.resume:
        trainer.load()

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        texts, _, expected = cache.draw(args.batch, generator)
        ids = torch.tensor(tokens(texts), device=args.device)
        with torch.no_grad():
            (target,) = teacher.encode(ids)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            hidden, pooled = model.encode(ids)
            picture = model.picture(pooled)
        imitation = (hidden[..., : target.shape[-1]].float() - target).square().mean()
        told = (picture.float() - expected.to(args.device)).square().mean()
        return imitation + POOLED_WEIGHT * told

    trainer.run(loss)


if __name__ == "__main__":
    main()
