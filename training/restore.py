"""Make checkpoints from an exported model, to train on where the originals are gone.

    python -m training.restore [--work FOLDER] [--model demo/darkroom/models/emoji]

Writes `vae.pt`, `text.pt`, `unet.pt` and the tokenizer into the work folder, unless they are there. They hold the
exported float16 weights, no optimiser state and no time trained: `--resume` begins a new cosine from them. The head
of `train_text` is not exported, so that script starts it afresh.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from training.export import OUTPUT
from training.loop import Plan, Trainer
from training.tokenizer import Encoder
from training.train_text import Regressor
from training.workspace import add_work_argument


def restore(model: Path, work: Path) -> list[str]:
    """Writes what is missing in `work`, and returns the names of the files."""
    if not (work / "tokenizer").exists():
        shutil.copytree(model / "tokenizer", work / "tokenizer")
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    regressor = Regressor(Encoder(work / "tokenizer"))
    regressor.text.load_state_dict(pipe.text_encoder.state_dict())
    modules: dict[str, nn.Module] = {"vae": pipe.vae, "text": regressor, "unet": pipe.unet}
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
