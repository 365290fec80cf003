"""Write a model's diffusers folder from the checkpoints' averaged weights, as float16.

    python -m training.export [--work FOLDER] [--model emoji-turbo] [--scenes] [--output FOLDER] [--untrained]

What a model has in common with `emoji`, byte for byte, becomes a link to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTokenizer

from darkroom.bench.published_names import publish_names
from training import networks, vocabulary
from training.loop import averaged
from training.tokenizer import Encoder
from training.train_text import Regressor
from training.train_text_xl import TextEncoders
from training.train_unet import NOISE
from training.workspace import add_scenes_argument, add_work_argument

MODELS = Path(__file__).parent.parent / "demo" / "darkroom" / "models"
OUTPUT = MODELS / "emoji"
TURBO, XL = "emoji-turbo", "emoji-xl"
SHARED = {"vae": "vae", "text_encoder": "text_encoder", "tokenizer": "tokenizer", "tokenizer_2": "tokenizer"}
"""Folders that may be those of `emoji`, and which."""


def scheduler() -> DDIMScheduler:
    """The model's default scheduler: everything stated, nothing left to a class's own defaults."""
    made = DDIMScheduler(
        **NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    # Other classes are made from this config; PNDM without this one takes its slow Runge-Kutta warm-up.
    made.register_to_config(skip_prk_steps=True)
    return made


def pipeline(work: Path, untrained: bool = False, model: str = OUTPUT.name, scenes: bool = False) -> DiffusionPipeline:
    """The whole model in float32. `untrained` fills in fresh weights where a checkpoint is missing.

    `scenes`: `emoji` of 256 pixels.
    """
    tokens = Encoder(work / "tokenizer")

    def trained(module: nn.Module, name: str) -> nn.Module:
        path = work / f"{name}.pt"
        if path.exists() or not untrained:
            module.load_state_dict(averaged(path))
        return module.eval()

    vae = networks.vae_256() if scenes else networks.vae()
    vae = trained(vae, "decoder" if (work / "decoder.pt").exists() else "vae")
    cache = work / "latents.pt"
    scale = torch.load(cache, weights_only=True)["scale"] if cache.exists() or not untrained else 0.18215
    vae.register_to_config(scaling_factor=scale)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    tokenizer.init_kwargs["local_files_only"] = False  # written too, and else true where the hub is switched off
    parts = {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler()}
    if model == XL:
        encoders = trained(TextEncoders(tokens), "text_xl")
        return StableDiffusionXLPipeline(
            text_encoder=encoders.first,
            text_encoder_2=encoders.second,
            tokenizer_2=parts["tokenizer"],
            unet=trained(networks.unet_xl(), "unet_xl"),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
            **parts,
        )
    if model == TURBO:
        parts["scheduler"] = LCMScheduler.from_config(scheduler().config)
    return StableDiffusionPipeline(
        text_encoder=trained(Regressor(tokens, scenes), "text").text,
        unet=trained(networks.unet_256() if scenes else networks.unet(), "turbo" if model == TURBO else "unet"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


def link_shared(output: Path, original: Path) -> None:
    """Replaces folders of a model that hold the same files as the original's with relative links to those."""
    for ours, theirs in SHARED.items():
        mine, its = output / ours, original / theirs
        if mine.is_dir() and not mine.is_symlink() and _contents(mine) == _contents(its):
            shutil.rmtree(mine)
            mine.symlink_to(os.path.relpath(its, output), target_is_directory=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    """Export and check that the folder loads."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--model", choices=(OUTPUT.name, TURBO, XL), default=OUTPUT.name)
    parser.add_argument("--output", type=Path, help="default: its folder in demo/darkroom/models")
    parser.add_argument("--untrained", action="store_true", help="fresh weights where a checkpoint is missing")
    args = add_scenes_argument(parser).parse_args()
    if args.scenes and not args.output:
        parser.error("--scenes needs --output: the folder of `emoji` holds the model of 128 pixels")
    output = args.output or MODELS / args.model
    for part in SHARED:
        if (output / part).is_symlink():
            (output / part).unlink()  # or the export would write into the original
    pipeline(args.work, args.untrained, args.model, args.scenes).to(dtype=torch.float16).save_pretrained(output)
    # Clean of what this machine left in: CLIPTokenizer and save_pretrained write where things came from.
    for path in output.rglob("*.json"):
        config = json.loads(path.read_text("utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for folder in output.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            shutil.copy(args.work / "tokenizer" / name, folder / name)
    if args.scenes:  # so that a prompt's other words can be named
        (output / "words.txt").write_text("\n".join(vocabulary.known(vocabulary.load(args.work))) + "\n", "utf-8")
    for path in output.glob("text_encoder*/*.safetensors"):
        publish_names(path)  # as transformers before its version 5 needs them
    for path in output.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner alone
    if args.model != OUTPUT.name:
        link_shared(output, OUTPUT)
    DiffusionPipeline.from_pretrained(output, dtype=torch.float32)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{output}: {size / 1e6:.1f} MB of its own")


if __name__ == "__main__":
    main()
