"""The flags that define a picture and how it is made: each is declared here, once, as data.

The scripts' parsers, requests, what a recipe fixes, the fields of prompt files, a server's inputs, refusals and the
reference in docs/flags.md follow from `GROUPS`. What one tool alone has, and no request holds, stands in its parser.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from darkroom.contract import AUTO, PRECISIONS, precisions_by_stage
from darkroom.errors import unknown
from darkroom.noise import SEED_LIMIT
from darkroom.schedule import SCHEDULERS, SIGMAS

PIXEL_MULTIPLE = 8
"""Height and width are multiples of what one latent covers."""

FLOAT32_MOST = (2 - 2**-23) * 2.0**127
"""The largest number that networks compute with."""

INT32_MOST = 2**31 - 1

OPSETS = range(17, 21)
"""ONNX opsets that graphs can be exported with: the tracing exporter ends at 20, LayerNormalization began with 17."""

BUILDS = ("static-batch", "dynamic-batch", "dynamic-shape")
"""What an engine leaves free: nothing; the batch; the batch, height and width."""

NUM_IMAGES = "num_images"
"""The field of rows, and of requests to a server, for the number of images of a prompt. No `Request` holds it."""

SYNTAXES = ("plain", "a1111")
"""How prompts are read: as texts, or with weights, chunks and escapes as AUTOMATIC1111's web interface reads them."""

SLOTS = 4
"""Images that are made at a time of a file of prompts."""

DEMO, FROM_TEXT, FROM_IMAGE, INPAINTING = "demo", "from text", "from an image", "inpainting"
REFINING, FEW_STEPS, CONTROLLED, CONTROLLING = "refining", "few steps", "controlled", "controlling"
FLOW = "flow matching"
"""What a script that makes pictures is, which decides the flags it has: see `Script.kinds`."""

BUILD, SWEEP, COMPARE = "build_engines.py build", "benchmark.py run", "benchmark.py compare"
BENCHMARKS = (SWEEP, COMPARE)
TRYING = (BUILD, *BENCHMARKS)
STORES = "build_engines.py"
TRITON, WEB = "build_triton_repository.py", "serve.py"
TOOLS = (*TRYING, TRITON, WEB)
CLIENT = "client.py"
"""The tools and commands that have flags of `GROUPS`, too; STORES stands for all others of that script."""

BOUNDS = ("LEAST", "BEST", "MOST")
MODEL = "PATH_OR_REPO"
PATHS = (MODEL, "FILE_OR_REPO", "FILE", "DIR")
"""What stands for names of files, folders and models, none of which is empty."""


class Use(enum.Flag):
    """What a flag counts for beside its script: a field of the request; a field of rows in prompt files, which is an
    input of served models, too; and what is recorded in a recipe, beside which the flag is refused."""

    NONE = 0
    REQUEST = enum.auto()
    ROW = enum.auto()
    RECIPE = enum.auto()


NONE, REQUEST, ROW, RECIPE = Use.NONE, Use.REQUEST, Use.ROW, Use.RECIPE
KINDS = {str: "a text", int: "a whole number", float: "a number"}


def option(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def pixel_size(text: str) -> tuple[int, int]:
    """`512` or `512x768` -> height and width in pixels. Raises `ValueError` for anything else."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


@dataclass(frozen=True)
class Flag:
    """A flag, and all that follows from it.

    `name` is the parser's attribute, and the request's and the row's unless `field` or `row` is another. `metavar` has
    a word for each value that it takes, and `help` words in braces that depend on the script. `kind` makes a value of a
    text; bool stands for a flag that takes none. A `default` of None is the model's, the machine's or the script's.

    `scripts` and `also` have it, and so have `lists`, where it takes several values that are tried one by one.
    `together` it takes several everywhere. `switches` are the help of each of its `choices`, which are then flags of
    their own; `by_stage` are those that networks may have for themselves, as "unet=bf16,clip=fp32". `exclusive` flags
    of a group exclude each other. `needs` is the flag without which it has no effect; `beside_prompts` is why it is
    refused beside --prompts.
    """

    name: str
    metavar: str | tuple[str, ...]
    help: str
    kind: Callable[[str], Any] = str
    use: Use = NONE
    default: Any = None
    least: int | None = None
    most: float | None = None
    multiple: int = 1
    choices: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    by_stage: tuple[str, ...] = ()
    together: bool = False
    exclusive: bool = False
    scripts: tuple[str, ...] = (DEMO,)
    also: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    field: str = ""
    row: str = ""
    needs: str = ""
    beside_prompts: str = ""

    @property
    def tensor_type(self) -> str:
        """How a served model takes it, as Triton names types."""
        whole = "UINT64" if self.most is not None and self.most > INT32_MOST else "INT32"
        return {str: "STRING", int: whole, float: "FP32"}[self.kind]

    def wrong(self, value: Any) -> str | None:
        """What is wrong with a value, to follow a name that its user knows; None where nothing is."""
        kind = int | float if self.kind is float else self.kind
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"must be {KINDS[self.kind]}, not {value!r}."
        if self.kind is str:
            if not (self.by_stage and "=" in value):
                return wrong_text(value, self.choices)
            own = precisions_by_stage(value)
            if len(own) != len(value.split(",")):
                return f"is {value!r}: write NETWORK=PRECISION once for each, with commas between."
            return next(filter(None, (wrong_text(each, self.by_stage) for each in own.values())), None)
        if self.multiple > 1 and (value < self.multiple or value % self.multiple):
            near = max(self.multiple, (value + self.multiple // 2) // self.multiple * self.multiple)
            return f"must be a multiple of {self.multiple}, not {value}: {near} is near."
        if self.most is not None and not (self.least or 0) <= value <= self.most:
            most = self.most if isinstance(self.most, int) else f"{self.most:.2g}"
            return f"must be a number from {self.least} to {most}, not {value}."
        if self.least is not None and value < self.least:
            return f"must be {self.least} or more, not {value}."
        return None


def wrong_text(text: str, choices: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a text; None where nothing is. Without `choices` any will do."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"is not valid UTF-8 text: {text.encode('utf-8', 'backslashreplace')!r}."
    if choices and text not in choices:
        return f"{unknown(text, list(choices))}."
    return None


# A table, with a line or two for each flag.
# fmt: off
GROUPS: dict[str, tuple[Flag, ...]] = {
    "the picture": (
        Flag("prompt", "PROMPT", "what the pictures should show; several make several", use=ROW),
        Flag("negative_prompt", "TEXT", "what they should not show", use=REQUEST | ROW | RECIPE, also=(CLIENT,)),
        Flag("prompt_2", "TEXT", "what the second text encoder reads, in the place of the prompt",
            use=REQUEST | ROW | RECIPE, also=(CLIENT,)),
        Flag("negative_prompt_2", "TEXT", "what it reads in the place of the negative prompt",
            use=REQUEST | ROW | RECIPE, also=(CLIENT,)),
        Flag("prompt_syntax", "NAME",
            "plain (default): as diffusers reads prompts, cut off where the text encoder ends; a1111: of any length, "
            "with (words), (words:1.3), [words], BREAK and \\( for a bracket", use=REQUEST | RECIPE,
            default=SYNTAXES[0], choices=SYNTAXES),
        Flag("wildcards", "DIR",
            "each image draws, by its seed, one of {{red|green}} in its prompt, as with the syntax a1111, and for "
            "__colour__ a line of colour.txt in this folder", use=RECIPE),
        Flag("height", "PIXELS", "a multiple of 8; default: {size}", int, REQUEST | ROW | RECIPE,
            multiple=PIXEL_MULTIPLE, also=(BUILD, CLIENT)),
        Flag("width", "PIXELS", "a multiple of 8; default: {size}", int, REQUEST | ROW | RECIPE,
            multiple=PIXEL_MULTIPLE, also=(BUILD, CLIENT)),
        Flag("denoising_steps", "N", "steps of the scheduler; default: the model's own", int, REQUEST | ROW | RECIPE,
            least=1, also=(CLIENT,), lists=TRYING, row="steps"),
        Flag("guidance_scale", "X", "how strictly to follow the prompt; 1 and below turn guidance off", float,
            REQUEST | ROW | RECIPE, least=0, most=FLOAT32_MOST, also=(*TRYING, CLIENT)),
        Flag("scheduler", "NAME", f"one of {', '.join(SCHEDULERS)}; default: the model's own",
            use=REQUEST | ROW | RECIPE, choices=tuple(SCHEDULERS), also=(CLIENT,), lists=(BUILD, SWEEP)),
        Flag("sigmas", "KIND", f"how the scheduler spaces its steps: {', '.join(SIGMAS)}; default: the scheduler's own",
            use=REQUEST | RECIPE, choices=tuple(SIGMAS), also=(BUILD,)),
        Flag("shift", "X",
            "how far the steps of flow matching are moved towards the noise, at every size; 1 is not at all; default: "
            "the model's own", float, REQUEST | RECIPE, least=0, most=FLOAT32_MOST, scripts=(FLOW,), also=(BUILD,)),
        Flag("max_sequence_length", "N", "tokens of a prompt that T5 reads; default: the model's own", int,
            REQUEST | RECIPE, least=2, scripts=(FLOW,), also=(BUILD,)),
        Flag("upscale", "FACTOR", "enlarge the finished pictures so many times, to 8, by Lanczos resampling; default 1",
            float, REQUEST | RECIPE, default=1.0, least=1, most=8),
        Flag("seed", "S", "image k gets the seed S+k; default: {seed}", int, REQUEST | ROW | RECIPE, least=0,
            most=SEED_LIMIT - 1, also=(*BENCHMARKS, CLIENT)),
        Flag("clip_skip", "N", "leave out the last N layers of the text encoder", int, REQUEST | RECIPE, default=0,
            least=0, also=(BUILD,)),
        Flag("batch_size", "B", "images that go through the engines together; default 1{of_prompts}", int,
            REQUEST | RECIPE, default=1, least=1, lists=TRYING),
        Flag("batch_count", "C", "batches for each prompt; default 1", int, REQUEST | RECIPE, default=1, least=1,
            beside_prompts="rows have num_images"),
        Flag(NUM_IMAGES, "N", "of each prompt; default: the model's own, 1", int, ROW, least=1, scripts=(CLIENT,)),
        Flag("prompts", "FILE",
            "a picture of every line: a prompt, or in a .jsonl file a JSON object with prompt and any of {fields}; the "
            "same command goes on where it was stopped", scripts=(FROM_TEXT,)),
        Flag("grid", "NAME=VALUES",
            "a picture of each combination, as of steps=10,20,30 guidance-scale=3,5, and a labelled sheet of them; any "
            "field of files of prompts has such an axis", use=RECIPE, together=True, scripts=(FROM_TEXT,),
            beside_prompts="its lines are combinations already"),
        Flag("recipe", "PNG", "remake the picture in this file, from the recipe it carries",
            beside_prompts="it is of one picture"),
        Flag("input_image", "FILE", "the picture to start from, turned as its EXIF says and without its transparency",
            use=REQUEST, scripts=(FROM_IMAGE,), beside_prompts="its pictures start from text"),
        Flag("image_strength", "X",
            "how far to leave it: the share of the steps that are made, or of the schedule with a latent consistency "
            "model, to 1; default {strength}", float, REQUEST | RECIPE, least=0, most=1, scripts=(FROM_IMAGE,),
            needs="input_image"),
        Flag("mask_image", "FILE",
            "what to paint anew of --input-image: white is, black stays; default: where that is transparent",
            scripts=(INPAINTING,)),
        Flag("mask_blur", "PIXELS", "how far the edge of the mask fades; default 0", float, RECIPE,
            scripts=(INPAINTING,)),
        Flag("outpaint", ("LEFT", "TOP", "RIGHT", "BOTTOM"),
            "pixels to add around the picture, multiples of 8, and to paint", int, RECIPE, scripts=(INPAINTING,)),
        Flag("no_keep", "", "also what the mask leaves may change a little, as in diffusers, by going through the VAE",
            bool, RECIPE, scripts=(INPAINTING,)),
        Flag("control_image", "FILE",
            "a map for each ControlNet, as it was trained on: edges, depths, poses", together=True,
            scripts=(CONTROLLED,), needs="controlnet"),
        Flag("control_scale", "X", "how strongly each ControlNet counts; default 1", float, RECIPE, together=True,
            scripts=(CONTROLLED,), needs="controlnet"),
        Flag("control_start", "X", "the share of the steps after which each begins to count; default 0", float, RECIPE,
            together=True, scripts=(CONTROLLED,), needs="controlnet"),
        Flag("control_end", "X", "the share of the steps after which each counts no more; default 1", float, RECIPE,
            together=True, scripts=(CONTROLLED,), needs="controlnet"),
        Flag("controlnet_type", "TYPE",
            "published ControlNets, as canny, depth, openpose; with canny the edges of --input-image are drawn here, "
            "others take ready maps", use=RECIPE, together=True, scripts=(CONTROLLING,),
            beside_prompts="its maps are of one picture"),
        Flag("input_image", "FILE", "a picture or map for each of --controlnet-type", together=True,
            scripts=(CONTROLLING,), needs="controlnet_type"),
        Flag("controlnet_scale", "X", "how strongly each of --controlnet-type counts; default 1", float, RECIPE,
            together=True, scripts=(CONTROLLING,), needs="controlnet_type"),
        Flag("enable_refiner", "", "let a second model go over the picture", bool, RECIPE, scripts=(REFINING,),
            beside_prompts="its pictures are made by one model"),
        Flag("image_strength", "X", "share of the steps that the refiner makes once more; default 0.3", float,
            REQUEST | RECIPE, default=0.3, least=0, most=1, scripts=(REFINING,), field="refiner_strength",
            needs="enable_refiner"),
    ),
    "the model": (
        Flag("version", "NAME", "one of {versions}; default: {version}", use=RECIPE, lists=(*TRYING, WEB)),
        Flag("model", MODEL,
            "a diffusers model folder, a hub repository owner/name, or one safetensors file in the original layout",
            use=REQUEST, lists=(*TRYING, WEB)),
        Flag("config", MODEL,
            "the diffusers folder or repository that a single-file --model has its configuration from; default: that "
            "of the published model of its architecture"),
        Flag("refiner_model", MODEL, "the refiner's folder or hub repository; default: {refiner}", use=REQUEST,
            scripts=(REFINING,), field="refiner", needs="enable_refiner"),
        Flag("vae", MODEL,
            "another VAE than the model's own: a file, its folder, a model's folder that has it, or a hub repository",
            use=REQUEST),
        Flag("controlnet", MODEL,
            "ControlNets to steer the picture with: folders, safetensors files or hub repositories; each needs its "
            "--control-image",
            together=True, scripts=(CONTROLLED,), beside_prompts="its maps are of one picture"),
        Flag("lora_path", "FILE_OR_REPO",
            "LoRA weights to fuse into the model, in safetensors files or hub repositories", together=True),
        Flag("lora_weight", "X", "how strongly each LoRA counts; default 1", float, RECIPE, together=True,
            needs="lora_path"),
        Flag("lora_scale", "X", "scales all of --lora-path; default 1", float, RECIPE, 1.0, needs="lora_path"),
        Flag("embedding", "FILE",
            "textual inversions, in safetensors files: words for prompts, called as their files are, or as those that "
            "diffusers wrote say", together=True),
        Flag("lcm_lora", "", "make a model of many steps one of few, with the LCM LoRA of its family", bool, RECIPE,
            scripts=(FEW_STEPS,)),
        Flag("hf_token", "TOKEN", "for gated models on the hub; default: $HF_TOKEN", also=TOOLS),
        Flag("framework_model_dir", "DIR", "download models here; default: the hub's own cache", also=TOOLS),
    ),
    "the engines": (
        Flag("engine", "NAME", "auto (default), {engines}", use=REQUEST | RECIPE, default="auto",
            also=(TRITON, WEB), lists=TRYING),
        Flag("torch_inference", "MODE",
            "run the model as it is, in PyTorch: eager is --engine torch; default, reduce-overhead and max-autotune "
            "are --engine torch-compile in that mode", use=RECIPE, also=BENCHMARKS),
        Flag("quantization", "KIND",
            "compute the denoiser's transformer blocks in int8 or fp8, on torch engines, and report what that costs",
            use=RECIPE, also=BENCHMARKS,
            beside_prompts="what it costs in quality is reported of the pictures of one run"),
        Flag("bf16", "", "the same as --precision bf16", bool, RECIPE, scripts=(FLOW,)),
        Flag("precision", "NAME",
            f"{', '.join(PRECISIONS)}; or some networks' own, as unet=bf16,clip=fp32; default {AUTO}: for each network "
            "the fastest that is measured to agree with fp32", use=REQUEST | RECIPE, default=AUTO,
            choices=(AUTO, *PRECISIONS), by_stage=PRECISIONS, also=(TRITON, WEB), lists=TRYING),
        Flag("size", "HxW", "heights and widths in pixels, as 512 or 512x768", pixel_size, scripts=(), lists=TOOLS),
        Flag("build", "", "", use=REQUEST | RECIPE, default=BUILDS[0], choices=BUILDS,
            switches=("engines for this batch and size alone (default)", "engines for any batch at this size",
            "engines for any batch and size"), exclusive=True, lists=(BUILD, SWEEP)),
        Flag("download_onnx_models", "", "has no effect: graphs are exported from the model's own weights", bool,
            scripts=(FLOW,)),
        Flag("onnx_opset", "N", f"{OPSETS[0]} to {OPSETS[-1]}; default {OPSETS[0]}", int, REQUEST | RECIPE,
            default=OPSETS[0], least=OPSETS[0], most=OPSETS[-1], also=TOOLS),
        Flag("provider", "NAME",
            "ONNX Runtime's execution provider: cpu (default), cuda, tensorrt, openvino, dml, coreml or another that "
            "it has; implies --engine onnxruntime", use=RECIPE, also=TOOLS),
        Flag("device", "NAME",
            "OpenVINO's device: CPU (default), GPU, GPU.1, NPU, AUTO:GPU,CPU, HETERO:GPU,CPU; implies --engine "
            "openvino", use=RECIPE, also=TOOLS),
        Flag("threads", "N", "CPU threads; default: what the runtime takes", int, least=1, also=(WEB,),
            lists=BENCHMARKS),
        Flag("devices", "DEVICE", "with --engine jax: how many devices divide each batch among them, or all{workers}",
            together=True, also=TRYING),
        Flag("ray", "ADDRESS",
            "with --prompts: these processes as Ray actors, on the cluster at this address, auto or local",
            scripts=(FROM_TEXT,), needs="prompts"),
        Flag("num_warmup_runs", "N", "untimed runs before the timed ones; default {warmup_runs}", int, least=0,
            also=BENCHMARKS, beside_prompts="engines are warmed up when loaded"),
        Flag("use_cuda_graph", "", "capture the networks and the loop as CUDA graphs, on engines that have CUDA", bool,
            also=BENCHMARKS),
        Flag("low_vram", "", "load one network at a time, and let go of it for the next", bool,
            beside_prompts="its engines stay loaded"),
        Flag("nvtx_profile", "", "mark the stages for NVIDIA's profilers", bool),
    ),
    "building TensorRT engines": (
        Flag("dynamic_batches", BOUNDS, "bounds of a free batch, and the one to be best at; default: 1 1 8", int,
            also=TOOLS),
        Flag("dynamic_sizes", BOUNDS,
            "bounds in pixels of free heights and widths; default: from the model's size to half as much again", int,
            also=TOOLS),
        Flag("compute_capability", "X.Y",
            "of the GPUs that engines are for; default: the GPU at hand, or without one 8.0 and later", together=True,
            also=TOOLS),
        Flag("optimization_level", "N", "from 0, builds fastest, to 5, runs fastest; default 3", int, also=TOOLS),
        Flag("workspace", "GIB", "memory that an engine's layers may work in", float, also=TOOLS),
        Flag("timing_cache", "FILE", "keep what building timed, for the next build", also=TOOLS),
        Flag("build_enable_refit", "", "has no effect: LoRAs are fused into the weights that an engine is built from",
            bool, also=TOOLS),
        Flag("ws", "", "stream weights to the GPU where its memory is short of them", bool, also=TOOLS),
        Flag("t5_ws_percentage", "N",
            "how much of T5's weights stays on the GPU, in percent; default: what there is room for", int, least=0,
            most=100, scripts=(FLOW,), needs="ws"),
        Flag("transformer_ws_percentage", "N", "the same of the transformer's", int, least=0, most=100,
            scripts=(FLOW,), needs="ws"),
        Flag("int8", "", "has no effect: these engines compute in fp32, fp16 or bf16", bool),
        Flag("fp8", "", "has no effect, as --int8", bool),
        Flag("quantization_level", "N", "has no effect, as --int8", float),
    ),
    "folders": (
        Flag("onnx_dir", "DIR", "ONNX graphs; default: onnx", also=(*TOOLS, STORES)),
        Flag("engine_dir", "DIR", "built engines and schedules; default: engines", also=(*TOOLS, STORES)),
        Flag("onnx_refiner_dir", "DIR", "the refiner's graphs; default: --onnx-dir", scripts=(REFINING,),
            needs="enable_refiner"),
        Flag("engine_refiner_dir", "DIR", "its engines; default: --engine-dir", scripts=(REFINING,),
            needs="enable_refiner"),
        Flag("output_dir", "DIR", "pictures; default: output", also=(WEB,)),
    ),
    "what is printed": (
        Flag("verbose", "", "also what each stage loads, builds and reuses", bool, exclusive=True, also=TOOLS),
        Flag("quiet", "", "only the paths of the pictures", bool, exclusive=True),
        Flag("dry_run", "", "report what would be fetched and made, and the disk and memory that takes; make nothing",
            bool, also=(BUILD,), beside_prompts="it is of one run"),
        Flag("json", "", "one machine-readable result on stdout, the rest on stderr", bool, also=(BUILD, STORES)),
    ),
}
# fmt: on

FLAGS = tuple(flag for flags in GROUPS.values() for flag in flags)
OF_REQUEST = {flag.field or flag.name: flag for flag in FLAGS if REQUEST in flag.use}
"""By the fields of a `Request` that they set."""

OF_ROW = {flag.row or flag.name: flag for flag in FLAGS if ROW in flag.use}
"""By their names in prompt files and as inputs of served models."""
