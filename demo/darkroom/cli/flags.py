"""The flags of the scripts, each documented where it is declared."""

import argparse
import sys
from collections.abc import Sequence

from darkroom.checkpoint.catalog import Script
from darkroom.cli.parser import TOKEN, TOKEN_FLAG, Parser, named
from darkroom.contract import PRECISIONS
from darkroom.engines import RUNTIMES
from darkroom.errors import InvalidRequest
from darkroom.request import BUILDS, OPSETS
from darkroom.schedule import SCHEDULERS

DEFAULT_STRENGTH, DEFAULT_REFINER_STRENGTH = 0.8, 0.3
DEFAULT_OPSET = 17
SHARES = "how many devices divide each batch among them, or all"
WORKERS = "a process for each, cpu (several share the cores) or the number of a GPU"
"""What `--devices` means."""

SLOTS = 4
"""Images that are made at a time of a file of prompts."""


def parsed(script: Script, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a script. All that stands behind `--` is a prompt, though it may begin with a dash."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = parser_of(script).parse_intermixed_args(arguments[:end])
    flags.prompt += arguments[end + 1 :]
    if any(TOKEN.search(prompt) for prompt in flags.prompt):
        raise InvalidRequest(f"a prompt, which is kept, holds what looks like a token: that goes behind {TOKEN_FLAG}.")
    return flags


def parser_of(script: Script) -> Parser:
    """Every flag of a script. A default of None means: what the model or the machine suggests."""
    versions = list(script.versions)
    for_a_file = "" if script.from_image else f", with --prompts {SLOTS}"
    size = "the input image's own" if script.from_image else "the model's own"
    parser = Parser(
        prog=script.program,
        allow_abbrev=False,
        description="Makes pictures from prompts, through engines compiled for this machine.",
    )
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="what the pictures should show; several make several"
    )
    picture = parser.add_argument_group("the picture")
    picture.add_argument("--negative-prompt", default=None, metavar="TEXT", help="what they should not show")
    picture.add_argument("--height", type=int, metavar="PIXELS", help=f"a multiple of 8; default: {size}")
    picture.add_argument("--width", type=int, metavar="PIXELS", help=f"a multiple of 8; default: {size}")
    picture.add_argument(
        "--denoising-steps", type=int, metavar="N", help="steps of the scheduler; default: the model's own"
    )
    picture.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="how strictly to follow the prompt; 1 and below turn guidance off",
    )
    picture.add_argument(
        "--scheduler", metavar="NAME", help=f"one of {', '.join(SCHEDULERS)}; default: the model's own"
    )
    picture.add_argument("--seed", type=int, metavar="S", help="image k gets the seed S+k; default: drawn and printed")
    picture.add_argument("--clip-skip", type=int, metavar="N", help="leave out the last N layers of the text encoder")
    picture.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help=f"images that go through the engines together; default 1{for_a_file}",
    )
    picture.add_argument("--batch-count", type=int, metavar="C", help="batches for each prompt; default 1")
    if not script.from_image:
        picture.add_argument(
            "--prompts",
            metavar="FILE",
            help="a picture of every line: a prompt, or in a .jsonl file a JSON object with prompt and any of "
            "negative_prompt, seed, steps, guidance_scale, scheduler, height, width, num_images; the same command goes "
            "on where it was stopped",
        )
    picture.add_argument("--recipe", metavar="PNG", help="remake the picture in this file, from the recipe it carries")
    if script.from_image:
        picture.add_argument(
            "--input-image",
            metavar="FILE",
            help="the picture to start from, turned as its EXIF says and without its transparency",
        )
        picture.add_argument(
            "--image-strength",
            type=float,
            metavar="X",
            help="how far to leave it: the share of the steps that are made, or of the schedule with a latent "
            f"consistency model, to 1; default {DEFAULT_STRENGTH}",
        )
    if script.refiner:
        picture.add_argument(
            "--enable-refiner", action="store_true", default=None, help="let a second model go over the picture"
        )
        picture.add_argument(
            "--image-strength",
            type=float,
            metavar="X",
            help=f"share of the steps that the refiner makes once more; default {DEFAULT_REFINER_STRENGTH}",
        )
    model = parser.add_argument_group("the model")
    version_help = f"one of {', '.join(versions)}; default: {versions[0]}"
    if script.refiner:
        version_help += f", with --enable-refiner {script.real}"
    if script.few_steps:
        version_help += f", with --lcm-lora {script.of_many_steps}"
    model.add_argument("--version", metavar="NAME", help=version_help)
    model.add_argument(
        "--model",
        type=named,
        metavar="PATH_OR_REPO",
        help="a diffusers model folder, a hub repository owner/name, or one safetensors file in the original layout",
    )
    model.add_argument(
        "--config",
        type=named,
        metavar="PATH_OR_REPO",
        help="the diffusers folder or repository that a single-file --model has its configuration from; default: that "
        "of the published model of its architecture",
    )
    if script.refiner:
        model.add_argument(
            "--refiner-model",
            type=named,
            metavar="PATH_OR_REPO",
            help=f"the refiner's folder or hub repository; default: {script.refiner.source}",
        )
    model.add_argument(
        "--vae",
        type=named,
        metavar="PATH_OR_REPO",
        help="another VAE than the model's own: its folder, the folder of a model that has it, or a hub repository",
    )
    model.add_argument(
        "--lora-path",
        nargs="+",
        action="extend",
        type=named,
        metavar="FILE_OR_REPO",
        help="LoRA weights to fuse into the model, in safetensors files or hub repositories",
    )
    model.add_argument(
        "--lora-weight",
        nargs="+",
        action="extend",
        type=float,
        metavar="X",
        help="how strongly each LoRA counts; default 1",
    )
    model.add_argument("--lora-scale", type=float, metavar="X", help="scales all of --lora-path; default 1")
    if script.few_steps:
        model.add_argument(
            "--lcm-lora",
            action="store_true",
            default=None,
            help="make a model of many steps one of few, with the LCM LoRA of its family",
        )
    model.add_argument("--hf-token", metavar="TOKEN", help="for gated models on the hub; default: $HF_TOKEN")
    model.add_argument(
        "--framework-model-dir", type=named, metavar="DIR", help="download models here; default: the hub's own cache"
    )
    engine = parser.add_argument_group("the engines")
    engine.add_argument("--engine", default=None, metavar="NAME", help=f"auto (default), {', '.join(RUNTIMES)}")
    engine.add_argument(
        "--torch-inference",
        metavar="MODE",
        help="run the model as it is, in PyTorch: eager is --engine torch; default, reduce-overhead and max-autotune "
        "are --engine torch-compile in that mode",
    )
    engine.add_argument(
        "--quantization",
        metavar="KIND",
        help="compute the UNet's transformer blocks in int8 or fp8, on torch engines, and tell what quality that costs",
    )
    engine.add_argument("--precision", metavar="NAME", help=f"{', '.join(PRECISIONS)}; default: fp32")
    add_build_arguments(engine)
    add_place_arguments(engine)
    engine.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: what the runtime takes")
    workers = "" if script.from_image else f"; with --prompts: {WORKERS}"
    engine.add_argument(
        "--devices", nargs="+", action="extend", metavar="DEVICE", help=f"with --engine jax: {SHARES}{workers}"
    )
    if not script.from_image:
        engine.add_argument(
            "--ray",
            metavar="ADDRESS",
            help="with --prompts: these processes as Ray actors, on the cluster at this address, auto or local",
        )
    engine.add_argument(
        "--num-warmup-runs", type=int, default=0, metavar="N", help="untimed runs before the timed one; default 0"
    )
    engine.add_argument(
        "--use-cuda-graph",
        action="store_true",
        help="capture the networks and the loop as CUDA graphs, on engines that have CUDA",
    )
    engine.add_argument("--nvtx-profile", action="store_true", help="mark the stages for NVIDIA's profilers")
    add_tensorrt_arguments(parser)
    folders = parser.add_argument_group("folders")
    folders.add_argument("--onnx-dir", type=named, metavar="DIR", help="ONNX graphs; default: onnx")
    folders.add_argument(
        "--engine-dir", type=named, metavar="DIR", help="built engines and schedules; default: engines"
    )
    if script.refiner:
        folders.add_argument(
            "--onnx-refiner-dir", type=named, metavar="DIR", help="the refiner's graphs; default: --onnx-dir"
        )
        folders.add_argument(
            "--engine-refiner-dir", type=named, metavar="DIR", help="its engines; default: --engine-dir"
        )
    folders.add_argument("--output-dir", type=named, metavar="DIR", help="pictures; default: output")
    output = parser.add_argument_group("what is printed")
    talk = output.add_mutually_exclusive_group()
    talk.add_argument("--verbose", action="store_true", help="also what each stage loads, builds and reuses")
    talk.add_argument("--quiet", action="store_true", help="only the paths of the pictures")
    output.add_argument("--json", action="store_true", help="one machine-readable result on stdout, the rest on stderr")
    return parser


def add_build_arguments(engine: argparse._ArgumentGroup, several: bool = False, opset: bool = True) -> None:
    """Which sizes engines leave free, `several` of which may be asked for at once; and the ONNX `opset`."""
    build = engine if several else engine.add_mutually_exclusive_group()
    leaves_free = (
        "engines for this batch and size alone (default)",
        "engines for any batch at this size",
        "engines for any batch and size",
    )
    for name, text in zip(BUILDS, leaves_free, strict=True):
        action = "append_const" if several else "store_const"
        build.add_argument(f"--build-{name}", dest="build", action=action, const=name, help=text)
    if opset:
        engine.add_argument(
            "--onnx-opset", type=int, metavar="N", help=f"{OPSETS[0]} to {OPSETS[-1]}; default {DEFAULT_OPSET}"
        )


def add_place_arguments(engine: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Where a runtime runs networks: see `darkroom.engines.runtime.PLACES`."""
    engine.add_argument(
        "--provider",
        metavar="NAME",
        help="ONNX Runtime's execution provider: cpu (default), cuda, tensorrt, openvino, dml, coreml or another that "
        "it has; implies --engine onnxruntime",
    )
    engine.add_argument(
        "--device",
        metavar="NAME",
        help="OpenVINO's device: CPU (default), GPU, GPU.1, NPU, AUTO:GPU,CPU, HETERO:GPU,CPU; implies --engine "
        "openvino",
    )


def add_tensorrt_arguments(parser: argparse.ArgumentParser) -> None:
    """What TensorRT's engines are built with: see `darkroom.engines.runtime.Options`."""
    build = parser.add_argument_group("building TensorRT engines")
    bounds = ("LEAST", "BEST", "MOST")
    build.add_argument(
        "--dynamic-batches",
        nargs=3,
        type=int,
        metavar=bounds,
        help="bounds of a free batch, and the one to be best at; default: 1 1 8",
    )
    build.add_argument(
        "--dynamic-sizes",
        nargs=3,
        type=int,
        metavar=bounds,
        help="bounds in pixels of free heights and widths; default: from the model's size to half as much again",
    )
    build.add_argument(
        "--compute-capability",
        nargs="+",
        action="extend",
        metavar="X.Y",
        help="of the GPUs that engines are for; default: the GPU at hand, or without one 8.0 and later",
    )
    build.add_argument(
        "--optimization-level", type=int, metavar="N", help="from 0, builds fastest, to 5, runs fastest; default 3"
    )
    build.add_argument("--workspace", type=float, metavar="GIB", help="memory that an engine's layers may work in")
    build.add_argument(
        "--timing-cache", type=named, metavar="FILE", help="keep what building timed, for the next build"
    )
    build.add_argument("--build-enable-refit", action="store_true", help="engines whose weights can be exchanged")
    build.add_argument("--build-all-tactics", action="store_true", help="let every source of kernels compete")
    build.add_argument("--ws", action="store_true", help="stream weights to the GPU where its memory is short of them")
