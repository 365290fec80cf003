"""Holds a checkout against another one: the pictures it makes again, and the time it takes.

python -m tests.replay make FOLDER --checkout BEFORE     # pictures of LINES, with recipes
python -m tests.replay check FOLDER --checkout AFTER     # remakes each by its recipe; --commands: by its line
python -m tests.replay time BEFORE AFTER --turns 15      # cold start and images/s, in turns

Each checkout builds and keeps what it needs in its own folders. `check` ends with 1 where a picture differs. A turn of
`time` runs both, the one that was second first; the first turn, which may build engines, is not counted.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support import edit_json, pixels, psnr

LINES = """
demo_txt2img.py "a red apple" --seed 3
demo_txt2img.py "a green cat, noto style" --seed 11 --scheduler Heun --denoising-steps 8 --negative-prompt "blue"
demo_txt2img.py "a yellow star, fluent style" --seed 5 --scheduler EulerA --batch-size 4
demo_txt2img.py "a rocket" --seed 7 --scheduler DPM++Karras --denoising-steps 10 --batch-size 4 --build-dynamic-batch
demo_txt2img.py "a blue house" --seed 13 --scheduler PNDM --height 96 --width 160 --build-dynamic-shape
demo_txt2img.py "a pizza, twemoji style" "a cake" --seed 4294967290 --guidance-scale 1 --clip-skip 2 --scheduler DDIM
demo_txt2img.py "a tiger" --seed 17 --lora-path lora.safetensors --lora-weight 0.8
demo_txt2img.py "a tiger" --seed 17 --lora-path lora.safetensors --lora-scale 0.5 --engine onnxruntime
demo_txt2img.py "a purple heart" --seed 19 --scheduler DDPM --clip-skip 1 --engine onnxruntime
demo_txt2img.py "a frog" --seed 23 --scheduler UniPC --guidance-scale 7.5 --build-dynamic-batch --engine onnxruntime
demo_txt2img.py "a violin" --seed 29 --scheduler LMSD --negative-prompt "red background" --engine torch
demo_txt2img.py "a tree" --seed 31 --scheduler Euler --batch-size 4 --height 192 --width 128 --engine torch
demo_txt2img.py "a moon, teal background" --seed 37 --scheduler DPM++ --denoising-steps 6 --engine jax
demo_txt2img_xl.py "a penguin, fluent style" --seed 41
demo_txt2img_xl.py "an orange" --seed 43 --scheduler DPM++ --batch-size 4 --width 160 --engine onnxruntime
demo_txt2img_xl.py "a whale" --seed 47 --clip-skip 1 --negative-prompt "green" --batch-count 2 --engine torch
demo_txt2img_xl.py "a fox" --seed 53 --scheduler Euler --enable-refiner --refiner-model refiner
demo_txt2img_xl.py "a fox" --seed 53 --enable-refiner --refiner-model refiner --image-strength 0.5 --engine torch
demo_turbo.py "a ghost, noto style, teal background" --seed 59
demo_turbo.py "a bee" --seed 61 --denoising-steps 1 --batch-size 4 --engine onnxruntime
demo_turbo.py "a lemon" --seed 67 --scheduler TCD --height 96 --build-dynamic-shape
demo_img2img.py "a green apple" --seed 71 --input-image 01.png --image-strength 0.6
demo_img2img.py "a tomato" --seed 73 --input-image 01.png --version emoji-xl --scheduler EulerA --engine onnxruntime
demo_img2img.py "a peach" --seed 79 --input-image 01.png --scheduler UniPC --batch-size 4 --width 96 --engine torch
"""
"""Run in the folder of the pictures. Of several pictures the last is kept: 01.png, 02.png and so on."""

FILES = ("--input-image", "--lora-path", "--refiner-model")
"""Flags that go beside --recipe, too: a recipe holds hashes of files, not where they are."""

MADE = "lines.json"
SAME = 60
"""dB; below that a picture counts as another."""

COLD = ["demo_txt2img.py", "a red apple", "--seed", "3"]
STEADY = [*COLD, "--batch-count", "10", "--num-warmup-runs", "1"]
RANK = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making, checking, timing = (commands.add_parser(name) for name in ("make", "check", "time"))
    for command in (making, checking):
        command.add_argument("folder", type=Path)
        command.add_argument("--checkout", type=Path, required=True)
    checking.add_argument("--commands", action="store_true", help="repeat the command lines, not the recipes")
    timing.add_argument("checkouts", type=Path, nargs=2, metavar="CHECKOUT")
    timing.add_argument("--turns", type=int, default=15)
    for command in (making, checking, timing):
        command.add_argument("--python", type=os.path.abspath, default=sys.executable, help="runs the scripts")
    flags = parser.parse_args()
    if flags.command == "time":
        compare_times(flags.python, flags.checkouts, flags.turns)
    elif flags.command == "make":
        make(flags.python, flags.checkout, flags.folder)
    elif not check(flags.python, flags.checkout, flags.folder, flags.commands):
        raise SystemExit(1)


def make(python: str, checkout: Path, folder: Path) -> None:
    """Pictures of all LINES, those LINES as data, and the LoRA and the refiner that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    models = next(checkout.glob("demo/**/emoji-xl")).parent
    write_lora(models / "emoji", folder / "lora.safetensors")
    write_refiner(models / "emoji-xl", folder / "refiner")
    made = []
    for number, line in enumerate(LINES.strip().splitlines(), 1):
        words = shlex.split(line)
        picture = f"{number:02}.png"
        with tempfile.TemporaryDirectory() as output:
            shutil.copy(draw(python, checkout, folder, [*words, "--output-dir", output]), folder / picture)
        made.append({"picture": picture, "words": words})
        print(picture, line, flush=True)
    (folder / MADE).write_text(json.dumps(made, indent=1))


def check(python: str, checkout: Path, folder: Path, commands: bool) -> bool:
    """Makes every picture again and says how near it comes. Returns whether all are the same."""
    good = True
    for made in json.loads((folder / MADE).read_text()):
        words = made["words"]
        if not commands:
            files = [word for at, word in enumerate(words) if word in FILES or words[at - 1] in FILES]
            words = [words[0], "--recipe", made["picture"], *files]
        with tempfile.TemporaryDirectory() as output:
            try:
                first = pixels(folder / made["picture"])
                again = pixels(draw(python, checkout, folder, [*words, "--output-dir", output]))
            except subprocess.CalledProcessError as error:
                good, told = False, f"failed: {(error.stderr.strip() or str(error)).splitlines()[-1]}"
            else:
                near = psnr(first, again) if first.shape == again.shape else 0.0
                good = good and near >= SAME
                told = f"{near:5.1f} dB, {'identical' if near == math.inf else 'not identical'}"
        print(f"{made['picture']}  {told:22}  {shlex.join(made['words'])}", flush=True)
    return good


def compare_times(python: str, checkouts: list[Path], turns: int) -> None:
    """Prints the median seconds of both, and the median of how many times as long the second took in a turn."""
    here = Path.cwd()

    def cold(checkout: Path, output: str) -> float:
        start = time.perf_counter()
        draw(python, checkout, here, [*COLD, "--output-dir", output])
        return time.perf_counter() - start

    def steady(checkout: Path, output: str) -> float:
        told = run(python, checkout, here, [*STEADY, "--json", "--output-dir", output])
        return 1 / json.loads(told)["images_per_second"]

    with tempfile.TemporaryDirectory() as output:
        for name, measure in (("cold start, s", cold), ("steady, s/image", steady)):
            taken: list[list[float]] = [[], []]
            for turn in range(-1, turns):
                for which in (0, 1) if turn % 2 else (1, 0):
                    seconds = measure(checkouts[which], output)
                    if turn >= 0:
                        taken[which].append(seconds)
            first, second = map(statistics.median, taken)
            ratio = statistics.median(after / before for before, after in zip(*taken, strict=True))
            print(f"{name}: {first:.3f} and {second:.3f}, {ratio:.3f} times as long, {turns} turns", flush=True)


def run(python: str, checkout: Path, folder: Path, words: list[str]) -> str:
    """What a script of a checkout prints, run in a folder. Raises `CalledProcessError` with what it says of a fault."""
    script, *arguments = words
    demo = checkout.resolve() / "demo"
    path = {"PYTHONPATH": os.pathsep.join([str(demo), str(demo.parent)])}
    ran = subprocess.run(
        [python, str(demo / script), *arguments], cwd=folder, env=os.environ | path, text=True, capture_output=True
    )
    if ran.returncode:
        error = subprocess.CalledProcessError(ran.returncode, shlex.join(words), stderr=ran.stderr)
        error.add_note(ran.stderr)
        raise error
    return ran.stdout


def draw(python: str, checkout: Path, folder: Path, words: list[str]) -> Path:
    """The last picture of a line."""
    return Path(run(python, checkout, folder, [*words, "--quiet"]).splitlines()[-1])


def write_lora(model: Path, path: Path) -> None:
    """Random changes to the queries and values of a model's UNet, as diffusers names them."""
    generator = np.random.default_rng(0)
    lora = {}
    for name, weight in load_file(next((model / "unet").glob("*.safetensors"))).items():
        if name.endswith(("to_q.weight", "to_v.weight")):
            layer = f"unet.{name.removesuffix('.weight')}"
            for side, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
                random = generator.standard_normal(shape) * (float(weight.std()) / RANK) ** 0.5
                lora[f"{layer}.lora_{side}.weight"] = random.astype(np.float16)
    save_file(lora, path, {"format": "pt"})


def write_refiner(model: Path, folder: Path) -> None:
    """A small SDXL as its own refiner: what its UNet has for the first text encoder and for the target size is cut."""
    shutil.copytree(
        model, folder, ignore=shutil.ignore_patterns("text_encoder", "tokenizer", "*.md", "*.png"), dirs_exist_ok=True
    )
    edit_json(
        folder / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    text, unet = (folder / part / "config.json" for part in ("text_encoder_2", "unet"))
    width = json.loads(text.read_text())["hidden_size"]
    unet_config = json.loads(unet.read_text())
    one, inputs = (unet_config[name] for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"))
    edit_json(unet, cross_attention_dim=width, projection_class_embeddings_input_dim=inputs - one)
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    for name, weight in tensors.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            tensors[name] = np.ascontiguousarray(weight[:, -width:])
        elif name == "add_embedding.linear_1.weight":
            tensors[name] = np.ascontiguousarray(weight[:, :-one])
    save_file(tensors, weights, {"format": "pt"})


if __name__ == "__main__":
    main()
