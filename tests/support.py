"""What several tests share: a tiny model in the hub's layout, ways to run the script, and a ruler for pictures."""

import contextlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from darkroom.schedule import schedulers_for
from darkroom.store.fingerprints import hash_file, hash_json
from darkroom.values import to_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "demo" / "demo_txt2img.py"

SIZE = 64
"""Height and width in pixels of the tiny model's pictures."""

SOON = 600
"""Seconds for what ought to happen at once: a machine that is busy with something else may take minutes to."""

FACTS = "facts.json"
"""What the maker of artefacts returned, beside them."""

HEAVY = ("torch", "torchax", "diffusers", "transformers", "onnx")

COMPILED_MODULES = """
import json, os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
"""A program that runs a script, and says which modules that imported: none of HEAVY, where its engines are there."""

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("red", "green", "blue", "apple", "cat", "dog", "house", "on", "the", "style", "noto", "background")
"""Words that the merges of the tiny model's tokenizer come from."""


def until(true: Callable[[], bool], within: float = SOON) -> None:
    """Returns when it is, and fails when that takes more than so many seconds."""
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody has, below those that the system gives to whoever connects: it would
    give them away before a server that starts has them."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            with contextlib.suppress(OSError):
                port = random.SystemRandom().randrange(10_000, 32_000)
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, in dB; infinite when they are the same."""
    assert first.shape == second.shape, f"{first.shape} against {second.shape}"
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def pixels(path: Path | str) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.array(image)


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below `folders`, with size and modification time in nanoseconds."""
    paths = [path for folder in folders for path in (folder, *sorted(folder.rglob("*"))) if path.exists()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@dataclass(frozen=True)
class Ended:
    """A run that has ended: what the shell sees of it."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Drawn:
    """A run that made pictures: its `--json` result, and the pictures in order."""

    result: dict[str, Any]
    pictures: list[np.ndarray]
    err: str
    children: list[str]

    @property
    def paths(self) -> list[Path]:
        return [Path(image["path"]) for image in self.result["images"]]


def flags(**values: Any) -> list[str]:
    """`batch_size=2, verbose=True` -> `--batch-size=2 --verbose`; None leaves a flag out."""
    named = {
        f"--{name.replace('_', '-')}": value
        for name, value in values.items()
        if value is not None and value is not False
    }
    return [name if value is True else f"{name}={value}" for name, value in named.items()]


SHELF: ContextVar[Path | None] = ContextVar("SHELF", default=None)
"""A folder with what was exported and built, for whichever test wants the same; None where each has to do it."""


@contextlib.contextmanager
def on_shelf(folder: Path | None) -> Iterator[None]:
    token = SHELF.set(folder)
    try:
        yield
    finally:
        SHELF.reset(token)


@contextlib.contextmanager
def children_inline() -> Iterator[list[str]]:
    """Heavy work runs in this process, where torch is loaded already, and once for all that ask for the same; yields
    the names of what was called."""
    called: list[str] = []

    def call(
        function: Callable[..., Any], *arguments: Any, verbose: bool = False, progress: Callable[..., Any] | None = None
    ) -> Any:
        called.append(function.__name__)
        work = partial(function, *arguments, **({"progress": lambda *_: True} if progress else {}))
        shelf = SHELF.get()
        if shelf is None or called[-1] not in ("export_stage", "build_engine"):
            return work()
        *given, folder = arguments
        return _made_once(shelf / hash_json([called[-1], *map(_content, given)]), folder, work)

    with contextlib.ExitStack() as patched:
        for module in ("prepare", "cli.maintenance", "serving.planning"):
            patched.enter_context(mock.patch(f"darkroom.{module}.run_in_child", call))
        yield called


def _made_once(kept: Path, folder: Path, work: Callable[[], Any]) -> Any:
    """What `work` returns, which fills `folder`: both from `kept`, if they are there, and else into it."""
    facts = kept / FACTS
    if not facts.exists():
        made = work()
        temporary = Path(shutil.copytree(folder, tempfile.mkdtemp(dir=kept.parent), dirs_exist_ok=True))
        (temporary / FACTS).write_text(json.dumps(made))
        with contextlib.suppress(OSError):  # another process was faster
            temporary.rename(kept)
        return made
    shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FACTS))
    return json.loads(facts.read_text())


def _content(given: Any) -> Any:
    """An argument as JSON; in the place of a path the hash of what it leads to, and of what lies beside a file."""
    if not isinstance(given, Path):
        return to_json(given)
    root = given if given.is_dir() else given.parent
    files = sorted(Path(within) / name for within, _, names in os.walk(root, followlinks=True) for name in names)
    return [
        [str(file.relative_to(root)), _digest(file, file.stat().st_mtime_ns)] for file in files if file.name[0] != "."
    ]


@cache
def _digest(file: Path, changed: int) -> str:
    return hash_file(file)


@dataclass(frozen=True)
class Studio:
    """The three artefact folders of one user, and the script run on them."""

    root: Path
    model: Path
    home: Path = field(default=Path("home"))
    script: str = SCRIPT.name

    @property
    def onnx(self) -> Path:
        return self.root / "onnx"

    @property
    def engines(self) -> Path:
        return self.root / "engines"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def folders(self) -> list[str]:
        return flags(onnx_dir=self.onnx, engine_dir=self.engines, output_dir=self.output)

    def here(self, *arguments: str) -> Ended:
        """Runs the script's main in this process with these arguments alone."""
        return self._here(arguments)[0]

    def _here(self, arguments: tuple[str, ...]) -> tuple[Ended, list[str]]:
        from darkroom.checkpoint.catalog import SCRIPTS
        from darkroom.cli.main import run

        out, err = io.StringIO(), io.StringIO()
        with children_inline() as called, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(SCRIPTS[self.script], list(arguments))
        return Ended(code, out.getvalue(), err.getvalue()), called

    def draw(self, *prompts: str, model: Path | None = None, **values: Any) -> Drawn:
        """Makes pictures in this process with the tiny model (seed 5, 3 steps), and reads them back."""
        if "recipe" not in values:
            values = {"seed": 5, "denoising_steps": 3, "engine": "openvino"} | values
        arguments = [*prompts, *flags(model=model or self.model, json=True, **values), *self.folders()]
        ended, called = self._here(tuple(arguments))
        assert ended.code == 0, ended.err
        result = json.loads(ended.out)
        return Drawn(result, [pixels(image["path"]) for image in result["images"]], ended.err, called)

    def environment(self, **more: str) -> dict[str, str]:
        """A clean environment: no tokens, no proxies, a home of its own, and a hub that is not there."""
        home = self.root / self.home
        home.mkdir(exist_ok=True)
        kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ}
        return kept | {"HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", "LC_ALL": "C.UTF-8"} | more

    def shell(
        self,
        *arguments: str | bytes,
        cwd: Path | None = None,
        timeout: float = 1800,
        interpreter: tuple[str, ...] = (),
        **environment: str,
    ) -> Ended:
        """Runs `python demo/SCRIPT` with these arguments alone, as a process of its own."""
        command = [sys.executable, *(interpreter or (str(SCRIPT.with_name(self.script)),)), *arguments]
        done = subprocess.run(
            command,
            env=self.environment(**environment),
            cwd=cwd or self.root,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        return Ended(done.returncode, done.stdout, done.stderr)


def one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1 and len(text) > 1


def assert_refused(ended: Ended, *said: str) -> None:
    """Bad input ended the run: with exit code 2, and one line that has all of these words."""
    assert ended.code == 2 and one_line(ended.err), ended
    assert [words for words in said if words not in ended.err] == [], ended.err


def changed_copy(model: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a model folder, changed."""
    shutil.copytree(model, folder)
    change(folder)
    return folder


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_tokenizer(folder: Path, pad: str = END) -> dict[str, int]:
    """A byte-level CLIP vocabulary: bytes, bytes that end a word, whole WORDS, begin and end. Returns it."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.setdefault(parts[0], len(vocabulary))
    vocabulary |= {BEGIN: len(vocabulary), END: len(vocabulary) + 1}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


SCHEDULER_CONFIG = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""As published with Stable Diffusion 1.5."""

NOISE_SCHEDULERS = schedulers_for("PNDMScheduler", SCHEDULER_CONFIG)
"""The names of `--scheduler` for a model of such a configuration."""


def write_tiny_model(folder: Path) -> Path:
    """A Stable Diffusion of 64x64 pixels with random weights, in the layout of the hub."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    silence_libraries()
    vocabulary = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(1234)
    text = CLIPTextModel(tiny_text(vocabulary, 32, 2, projection_dim=32))
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    # Freshly made networks answer faintly: louder words and colours make every difference visible.
    louder(text, 40, "embedding")
    louder(unet, 4, "attn2.to_out", "attn2.to_v")
    louder(unet, 3, "conv_out.weight")
    text.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }
    _finish(folder, "StableDiffusionPipeline", SCHEDULER_CONFIG, parts)
    return folder


def write_tiny_xl_model(folder: Path, refiner: bool = False) -> Path:
    """An SDXL of 64x64 pixels with random weights and two different text encoders, in the layout of the hub.

    A `refiner` has the second of them alone, and is told an aesthetic score.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    silence_libraries()
    vocabulary = write_tokenizer(folder / "tokenizer_2", pad="!")
    torch.manual_seed(4321 + refiner)
    second = CLIPTextModelWithProjection(tiny_text(vocabulary, 32, 4, projection_dim=40, hidden_act="gelu"))
    texts = {"text_encoder_2": second}
    if not refiner:
        write_tokenizer(folder / "tokenizer")
        texts["text_encoder"] = CLIPTextModel(tiny_text(vocabulary, 24, 3, projection_dim=40))
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32 if refiner else 24 + 32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=(5 if refiner else 6) * 8 + 40,
        norm_num_groups=8,
    )
    louder(unet, 3, "attn2.to_out", "attn2.to_v", "add_embedding", "conv_out.weight")
    for part, text in texts.items():
        louder(text, 40, "embedding", "text_projection")
        text.save_pretrained(folder / part)
    unet.save_pretrained(folder / "unet")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": [None, None] if refiner else ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": not refiner,
        "requires_aesthetics_score": refiner,
    }
    config = SCHEDULER_CONFIG | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    kind = "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline"
    _finish(folder, kind, config, parts, scaling_factor=0.13025)
    return folder


SD3_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
"""As published with Stable Diffusion 3."""


def write_tiny_sd3_model(folder: Path, newer: bool = False) -> Path:
    """A Stable Diffusion 3 of 64x64 pixels with random weights, in the layout of the hub; or a 3.5 medium, whose
    transformer has dual attention in some blocks and normalises queries and keys."""
    import torch
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    silence_libraries()
    torch.manual_seed(2222 + newer)
    texts: dict[str, Any] = {}
    for name, pad, width, act in (("text_encoder", END, 24, "quick_gelu"), ("text_encoder_2", "!", 32, "gelu")):
        vocabulary = write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), pad=pad)
        texts[name] = CLIPTextModelWithProjection(
            tiny_text(vocabulary, width, 3, projection_dim=width - 4, hidden_act=act)
        )
    texts["text_encoder_3"] = tiny_t5(folder / "tokenizer_3", 64)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=20 + 28,
        pos_embed_max_size=12,
        **{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} if newer else {},
    )
    for part, text in texts.items():
        louder(text, 40, "embedding", "text_projection", "shared", "fc2.weight")
        text.save_pretrained(folder / part)
    louder(transformer, 6, "context_embedder", "text_embedder", "proj_out.weight")
    louder(transformer, 2, "attn", "ff")
    transformer.save_pretrained(folder / "transformer")
    parts = {
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    latents = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    _finish(folder, "StableDiffusion3Pipeline", SD3_SCHEDULER, parts, **latents, **convolutions)
    return folder


FLOW_SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 4,
    "max_image_seq_len": 64,
}
"""As published with FLUX.1-dev, but for pictures of a few tokens, whose steps would hardly differ otherwise."""

SENTENCE, SENTENCES = 16, 64
"""Tokens that the T5 and the Qwen3 of tiny models read."""


def write_tiny_flux_model(folder: Path, schnell: bool = False) -> Path:
    """A Flux.1-dev of random weights, or a `schnell`, whose guidance is not embedded; for pictures of 64x64 pixels."""
    import torch
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel

    silence_libraries()
    vocabulary = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(2468 + schnell)
    clip = CLIPTextModel(tiny_text(vocabulary, 24, 2))
    t5 = tiny_t5(folder / "tokenizer_2", 40)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 6, 6),
    )
    louder(clip, 40, "embedding")
    louder(t5, 20, "shared")
    louder(transformer, 3, "context_embedder", "time_text_embed", "attn.to_", "attn.add_", "proj_out.weight")
    parts = {"text_encoder": clip, "text_encoder_2": t5, "transformer": transformer}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    config = FLOW_SCHEDULER_CONFIG | ({"use_dynamic_shifting": False, "shift": 1.0} if schnell else {})
    vae = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    _finish(folder, "FluxPipeline", config, index, **vae, use_quant_conv=False, use_post_quant_conv=False)
    return folder


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As published with Qwen3, for one message."""


def write_tiny_klein_model(folder: Path, distilled: bool = True) -> Path:
    """A FLUX.2 klein of random weights, for pictures of 64x64 pixels."""
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    silence_libraries()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), "ed", "on", *special])}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[("e", "d"), ("o", "n")], model_max_length=131072)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = CHAT
    torch.manual_seed(1357)
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=SENTENCES,
            bos_token_id=vocabulary["<|endoftext|>"],
            eos_token_id=vocabulary["<|im_end|>"],
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIZE
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    louder(text, 40, "embed_tokens", "o_proj", "down_proj")
    louder(transformer, 3, "context_embedder", "attn.to_", "attn.add_", "modulation", "proj_out.weight")
    tokenizer.save_pretrained(folder / "tokenizer")
    parts = {"text_encoder": text, "transformer": transformer, "vae": vae}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(FLOW_SCHEDULER_CONFIG))
    index = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": distilled,
        "scheduler": ["diffusers", FLOW_SCHEDULER_CONFIG["_class_name"]],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_t5(tokenizer: Path, width: int) -> Any:
    """A T5 encoder of random weights; writes its tokenizer of WORDS and letters into the folder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), "▁", *"abcdefghijklmnopqrstuvwxyz,"]
    vocabulary = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=SENTENCE).save_pretrained(tokenizer)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(pieces), feed_forward_proj="gated-gelu", **sizes))


def tiny_text(vocabulary: dict[str, int], width: int, layers: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        **more,
    )


def louder(network: Any, factor: float, *names: str) -> None:
    """Multiplies the weights whose names hold one of `names`."""
    import torch

    with torch.no_grad():
        for name, weight in network.named_parameters():
            if any(part in name for part in names):
                weight.mul_(factor)


def _finish(folder: Path, pipeline: str, scheduler: dict[str, Any], parts: dict[str, Any], **vae: Any) -> None:
    """Writes a small VAE, the scheduler, and the model index."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **{"latent_channels": 4} | vae,
    ).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1))
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | parts, indent=1))


def silence_libraries() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


class Diffusers:
    """Pictures as diffusers' own pipeline makes them from a model folder: float32, a CPU generator an image."""

    def __init__(self, model: Path, **parts: Any) -> None:
        """`parts` stand in the place of the model's own; None for what it is to do without."""
        import torch
        from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

        silence_libraries()

        self.pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32, **parts)
        self.pipeline.set_progress_bar_config(disable=True)
        encoder = self.pipeline.text_encoder
        if not hasattr(encoder, "text_model"):
            # diffusers 0.42 looks for the final norm there when layers are skipped; transformers 5 has it one level up.
            object.__setattr__(encoder, "text_model", encoder)
        self._from_image = AutoPipelineForImage2Image.from_pipe(self.pipeline)
        self._from_image.set_progress_bar_config(disable=True)
        self.own_scheduler = self.pipeline.scheduler
        self._made: dict[str, list[np.ndarray]] = {}

    def draw(
        self,
        *prompts: str,
        seed: int = 5,
        scheduler: str | None = None,
        denoising_steps: int = 3,
        spacing: dict[str, Any] | None = None,
        **more: Any,
    ) -> list[np.ndarray]:
        """One picture a prompt, with seeds from `seed` up; `more` goes to the pipeline under diffusers' names, and
        `spacing` to the scheduler that is named.

        With an `image` among it, that pipeline is image-to-image, and with a `mask_image` the one for inpainting.
        """
        asked = repr((prompts, seed, scheduler, denoising_steps, spacing, sorted(more.items())))
        if asked not in self._made:
            import diffusers
            import torch

            from darkroom.schedule import SCHEDULERS

            pipeline = self._from_image if "image" in more else self.pipeline
            if "mask_image" in more:
                pipeline = diffusers.AutoPipelineForInpainting.from_pipe(self.pipeline)
                pipeline.set_progress_bar_config(disable=True)
            pipeline.scheduler = self.own_scheduler
            if scheduler is not None:
                name, overrides = SCHEDULERS[scheduler]
                overrides = overrides | (spacing or {})
                pipeline.scheduler = getattr(diffusers, name).from_config(self.own_scheduler.config, **overrides)
            if "negative_prompt" in more:
                more["negative_prompt"] = [more["negative_prompt"]] * len(prompts)
            generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(prompts))]
            images = pipeline(
                prompt=list(prompts),
                num_inference_steps=denoising_steps,
                generator=generators,
                **{"guidance_scale": 7.5} | more,
            ).images
            self._made[asked] = [np.array(image) for image in images]
        return self._made[asked]
