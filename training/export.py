"""Write the diffusers folder from the checkpoints' averaged weights, as float16.

python -m training.export [--work FOLDER] [--output demo/darkroom/models/emoji] [--untrained]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from training import networks
from training.loop import averaged
from training.tokenizer import Encoder
from training.train_text import Regressor
from training.train_unet import NOISE
from training.workspace import add_work_argument

OUTPUT = Path(__file__).parent.parent / "demo" / "darkroom" / "models" / "emoji"


def scheduler() -> DDIMScheduler:
    """The model's default scheduler: everything stated, nothing left to a class's own defaults."""
    made = DDIMScheduler(
        **NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    # Other classes are made from this config; PNDM without this one takes its slow Runge-Kutta warm-up.
    made.register_to_config(skip_prk_steps=True)
    return made


def pipeline(work: Path, untrained: bool = False) -> StableDiffusionPipeline:
    """The whole model in float32. `untrained` fills in fresh weights where a checkpoint is missing."""
    tokens = Encoder(work / "tokenizer")
    vae, regressor, unet = networks.vae(), Regressor(tokens), networks.unet()
    decoder = "decoder" if (work / "decoder.pt").exists() else "vae"
    for module, name in ((vae, decoder), (regressor, "text"), (unet, "unet")):
        path = work / f"{name}.pt"
        if path.exists() or not untrained:
            module.load_state_dict(averaged(path))
    cache = work / "latents.pt"
    scale = torch.load(cache, weights_only=True)["scale"] if cache.exists() or not untrained else 0.18215
    vae.register_to_config(scaling_factor=scale)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=regressor.text.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    """Export and check that the folder loads."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--untrained", action="store_true", help="fresh weights where a checkpoint is missing")
    args = parser.parse_args()
    pipeline(args.work, args.untrained).to(dtype=torch.float16).save_pretrained(args.output)
    # Clean of what this machine left in: CLIPTokenizer and save_pretrained write where things came from.
    for path in args.output.rglob("*.json"):
        config = json.loads(path.read_text("utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        shutil.copy(args.work / "tokenizer" / name, args.output / "tokenizer" / name)
    StableDiffusionPipeline.from_pretrained(args.output, torch_dtype=torch.float32)
    for path in args.output.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner alone
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
