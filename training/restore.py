"""Make checkpoints from an exported model, to train on where the originals are gone.

    python -m training.restore [--work FOLDER] [--model demo/darkroom/models/emoji]

Writes `vae.pt`, `text.pt`, `unet.pt` (of emoji-xl `text_xl.pt` and `unet_xl.pt`, of emoji-turbo `turbo.pt` in place of
the last) and the tokenizer into the work folder, unless they are there. They hold the exported float16 weights, no
optimiser state and no time trained: `--resume` begins a new cosine from them. The heads of `train_text` and
`train_text_xl` are not exported, so those scripts start them afresh.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from training.export import OUTPUT, TURBO, XL
from training.loop import Plan, Trainer
from training.tokenizer import Encoder
from training.train_text import Regressor
from training.train_text_xl import TextEncoders
from training.workspace import add_work_argument


def restore(model: Path, work: Path) -> list[str]:
    """Writes what is missing in `work`, and returns the names of the files."""
    if not (work / "tokenizer").exists():
        shutil.copytree(model / "tokenizer", work / "tokenizer")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    tokens = Encoder(work / "tokenizer")
    modules: dict[str, nn.Module] = {"vae": pipe.vae}
    if model.name == XL:
        encoders = TextEncoders(tokens)
        encoders.first.load_state_dict(pipe.text_encoder.state_dict())
        encoders.second.load_state_dict(pipe.text_encoder_2.state_dict())
        modules |= {"text_xl": encoders, "unet_xl": pipe.unet}
    else:
        regressor = Regressor(tokens)
        regressor.text.load_state_dict(pipe.text_encoder.state_dict())
        modules |= {"text": regressor, "turbo" if model.name == TURBO else "unet": pipe.unet}
    written = []
    for name, module in modules.items():
        path = work / f"{name}.pt"
        if not path.exists():
            Trainer(module, Plan(rate=0.0), path).save()
            written.append(path.name)
    return written


def main() -> None:
    """Restore and say what was written."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--model", type=Path, default=OUTPUT)
    args = parser.parse_args()
    print("written:", ", ".join(restore(args.model, args.work)) or "nothing, all of it is there")


if __name__ == "__main__":
    main()
