"""The original layout of Stable Diffusion (https://github.com/CompVis/stable-diffusion), by the names of its tensors.

For each tensor of a diffusers network it is known what the original calls it, so that every tensor of a file is
accounted for: used, known to be of no use, or named.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from darkroom.checkpoint.folder import read_header
from darkroom.errors import InvalidRequest, gist

IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UP_BLOCKS = ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3]
"""Those of a configuration that does not say."""
IN_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.to_([qkv])": r"attn_1.\1",
    r"attn_1\.to_out\.0": "attn_1.proj_out",
    r"down_blocks\.(\d+)\.resnets\.(\d+)": r"down.\1.block.\2",
    r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.(\d+)\.resnets\.(\d+)": r"up.\1.block.\2",
    r"up_blocks\.(\d+)\.upsamplers\.0": r"up.\1.upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}
IN_BFL = {
    r"^(single_)?transformer_blocks\.(\d+)\.": lambda found: f"{'single' if found[1] else 'double'}_blocks.{found[2]}.",
    r"^time_text_embed\.timestep_embedder\.": "time_in.",
    r"^time_text_embed\.guidance_embedder\.": "guidance_in.",
    r"^time_text_embed\.text_embedder\.": "vector_in.",
    r"_in\.linear_1\.": "_in.in_layer.",
    r"_in\.linear_2\.": "_in.out_layer.",
    r"^context_embedder\.": "txt_in.",
    r"^x_embedder\.": "img_in.",
    r"^proj_out\.": "final_layer.linear.",
    r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"\.norm1\.linear\.": ".img_mod.lin.",
    r"\.norm1_context\.linear\.": ".txt_mod.lin.",
    r"\.norm\.linear\.": ".modulation.lin.",
    r"\.ff\.net\.(\d)\.(proj\.)?": r".img_mlp.\1.",
    r"\.ff_context\.net\.(\d)\.(proj\.)?": r".txt_mlp.\1.",
    r"(double_blocks\.\d+)\.attn\.(to_[qkv]|norm_[qk]\b|to_out\.0)": r"\1.img_attn.\2",
    r"(double_blocks\.\d+)\.attn\.(add_[qkv]_proj|norm_added_[qk]|to_add_out)": r"\1.txt_attn.\2",
    r"_attn\.(to_[qkv]|add_[qkv]_proj)\.": "_attn.qkv.",
    r"_attn\.(to_out\.0|to_add_out)\.": "_attn.proj.",
    r"(single_blocks\.\d+)\.(attn\.to_[qkv]|proj_mlp)\.": r"\1.linear1.",
    r"(single_blocks\.\d+)\.proj_out\.": r"\1.linear2.",
    r"(single_blocks\.\d+)\.attn\.": r"\1.",
    r"\.norm_(added_)?q\.weight": ".norm.query_norm.scale",
    r"\.norm_(added_)?k\.weight": ".norm.key_norm.scale",
}
IN_MMDIT = {
    r"^pos_embed\.pos_embed$": "pos_embed",
    r"^pos_embed\.proj\.": "x_embedder.proj.",
    r"^time_text_embed\.timestep_embedder\.": "t_embedder.",
    r"^time_text_embed\.text_embedder\.": "y_embedder.",
    r"_embedder\.linear_1\.": "_embedder.mlp.0.",
    r"_embedder\.linear_2\.": "_embedder.mlp.2.",
    r"^proj_out\.": "final_layer.linear.",
    r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"^transformer_blocks\.": "joint_blocks.",
    r"\.(norm1_context|ff_context|attn\.(?:add_|norm_added_|to_add_))": r".context_block.\1",
    r"(\d)\.(norm1|ff|attn2?)\.": r"\1.x_block.\2.",
    r"\.norm1(_context)?\.linear\.": ".adaLN_modulation.1.",
    r"\.ff(_context)?\.net\.0\.proj\.": ".mlp.fc1.",
    r"\.ff(_context)?\.net\.2\.": ".mlp.fc2.",
    r"\.(to_out\.0|to_add_out)\.": ".proj.",
    r"\.(to_[qkv]|add_[qkv]_proj)\.": ".qkv.",
    r"\.norm_(?:added_)?([qk])\.": r".ln_\1.",
}
IN_OPEN_CLIP = {
    r"embeddings\.token_embedding": "token_embedding",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"final_layer_norm": "ln_final",
    r"text_projection\.weight": "text_projection",
    r"encoder\.layers": "transformer.resblocks",
    r"layer_norm(\d)": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
    r"self_attn\.[qkv]_proj\.": "attn.in_proj_",
}

SCALES = ("scale_weight", "weight_scale")
"""What a tensor in 8 bits has to be multiplied by, beside it: https://github.com/comfyanonymous/ComfyUI."""

NO_USE = re.compile(
    r"(.*\.)?(model_ema\..*|loss\..*|logit_scale|position_ids|attn_mask|text_projection(\.weight)?|scale_input|input_scale)"
    r"|scaled_fp8|.*\.scaled_fp8|(lightning_|global_|pytorch-lightning_)?(step|version|epoch)|denoiser\..*|state_info"
    r"|(sqrt_|log_|posterior_|lvlb_|alphas_|betas|logvar|one_minus_).*|model_ema.*|(optimizer|callback|lr_scheduler).*"
)
"""Tensors that training left in a file, and what of a text encoder is not read for pictures."""

DEEPER = re.compile(r".*\.(transformer\.resblocks|encoder\.layers)\.(\d+)\..*")

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
MARKERS = {
    V_PREDICTION: {"prediction_type": "v_prediction"},
    ZERO_SNR: {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
"""Empty tensors by which a file says how it was trained, and what the scheduler's configuration then says."""

FOREIGN = re.compile(r"edm_\w+(\..*)?|model_sampling.*|(model\.)?control_model\..*|cond_stage_model\.hf_.*")
"""Tensors of parametrisations, and of networks, that are not supported."""


def whole(value: Any) -> Any:
    """The tensor as it is."""
    return value


class Source(NamedTuple):
    """A tensor of the file, and what is to be done with it."""

    name: str
    change: Callable[[Any], Any] = whole


def of_unet(name: str, config: dict[str, Any]) -> list[Source]:
    """What the original calls a tensor of a UNet with this configuration."""
    for ours, theirs in IN_UNET.items():
        if name.startswith(f"{ours}."):
            return [Source(theirs + _in_resnet(name[len(ours) :]))]
    side, level, kind, index, rest = name.split(".", 4)
    per_level = _layers(config, int(level)) + 1
    down = side == "down_blocks"
    before = sum(_layers(config, each) + 1 for each in range(int(level)))
    if kind == "downsamplers":
        return [Source(f"input_blocks.{before + per_level}.0.op{rest.removeprefix('conv')}")]
    if not down:
        levels = len(config["block_out_channels"])
        before = sum(_layers(config, levels - 1 - each) + 1 for each in range(int(level)))
        per_level = _layers(config, levels - 1 - int(level)) + 1
    if kind == "upsamplers":
        place = 2 if "Attn" in config.get("up_block_types", UP_BLOCKS)[int(level)] else 1
        return [Source(f"output_blocks.{before + per_level - 1}.{place}.{rest}")]
    place = 0 if kind == "resnets" else 1
    block = f"input_blocks.{before + int(index) + 1}" if down else f"output_blocks.{before + int(index)}"
    return [Source(f"{block}.{place}{_in_resnet('.' + rest)}")]


def _layers(config: dict[str, Any], level: int) -> int:
    layers = config.get("layers_per_block", 2)
    return layers if isinstance(layers, int) else layers[level]


def _in_resnet(rest: str) -> str:
    first, _, behind = rest.removeprefix(".").partition(".")
    return f".{IN_RESNET.get(first, first)}.{behind}" if behind else rest


def of_controlnet(name: str, config: dict[str, Any]) -> list[Source]:
    """What the original calls a tensor of a ControlNet: as in the half of a UNet that it is, but for its own layers.
    Those that read maps have an activation between any two."""
    kind, _, rest = name.partition(".")
    if kind == "controlnet_down_blocks":
        index, rest = rest.split(".")
        return [Source(f"zero_convs.{index}.0.{rest}")]
    if kind == "controlnet_mid_block":
        return [Source(f"middle_block_out.0.{rest}")]
    if kind != "controlnet_cond_embedding":
        return of_unet(name, config)
    layer, _, rest = rest.removeprefix("blocks.").partition(".")
    blocks = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    place = {"conv_in": 0, "conv_out": blocks + 1}.get(layer)
    return [Source(f"input_hint_block.{2 * (int(layer) + 1 if place is None else place)}.{rest}")]


def of_vae(name: str, config: dict[str, Any]) -> list[Source]:
    """What the original calls a tensor of an AutoencoderKL."""
    levels = len(config["block_out_channels"])
    name = re.sub(r"(?<=up_blocks\.)\d+", lambda found: str(levels - 1 - int(found[0])), name)
    return [Source(_renamed(name, IN_VAE))]


def of_clip(name: str, config: dict[str, Any]) -> list[Source]:
    """A tensor of a CLIP text encoder, which has its name; older files leave out text_model."""
    bare = name.removeprefix("text_model.")
    return [Source(f"text_model.{bare}"), Source(bare)]


def of_open_clip(name: str, config: dict[str, Any]) -> list[Source]:
    """What OpenCLIP calls a tensor of a CLIP text encoder; queries, keys and values are thirds of one."""
    bare = name.removeprefix("text_model.")
    theirs = _renamed(bare, IN_OPEN_CLIP)
    if found := re.search(r"self_attn\.([qkv])_proj", bare):
        third = "qkv".index(found[1])
        return [Source(theirs, lambda value: value.chunk(3)[third])]
    if bare == "text_projection.weight":
        return [Source(theirs, lambda value: value.T), Source(bare)]
    return [Source(theirs)]


def of_bfl(name: str, config: dict[str, Any]) -> list[Source]:
    """What Black Forest Labs call a tensor of Flux's transformer; queries, keys and values are rows of one there, as is
    in the single blocks what feeds the perceptron. Nothing, for a tensor of another kind of transformer."""
    theirs = _renamed(name, IN_BFL)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if found := re.search(r"\.attn\.(?:to|add)_([qkv])(?:_proj)?\.|\.proj_mlp\.", name):
        first = "qkv".index(found[1]) if found[1] else 3
        return [Source(theirs, itemgetter(slice(first * width, (first + 1) * width if found[1] else None)))]
    if name.startswith("norm_out.linear."):  # shift and scale, which diffusers has the other way round
        return [Source(theirs, itemgetter([*range(width, 2 * width), *range(width)]))]
    return [Source(theirs)] if theirs != name else []


def of_mmdit(name: str, config: dict[str, Any]) -> list[Source]:
    """What Stability AI calls a tensor of Stable Diffusion 3's transformer; queries, keys and values are thirds of one.
    Shift and scale stand the other way round where nothing else is with them."""
    theirs = _renamed(name, IN_MMDIT)
    if found := re.search(r"\.(?:to|add)_([qkv])(?:_proj)?\.", name):
        return [Source(theirs, partial(_third, "qkv".index(found[1])))]
    last = f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear."
    return [Source(theirs, _halves_swapped if name.startswith(("norm_out.linear.", last)) else whole)]


def _third(which: int, value: Any) -> Any:
    count = len(value) // 3
    return value[which * count : (which + 1) * count]


def _halves_swapped(value: Any) -> Any:
    half = len(value) // 2
    return value[[*range(half, 2 * half), *range(half)]]


def of_t5(name: str, config: dict[str, Any]) -> list[Source]:
    """A tensor of a T5, which has its name; its embeddings have two."""
    return [Source(name), *([Source("shared.weight")] if name == "encoder.embed_tokens.weight" else [])]


def _renamed(name: str, table: dict[str, Any]) -> str:
    for ours, theirs in table.items():
        name = re.sub(ours, theirs, name)
    return name


LAYOUTS = {
    "compvis": of_unet,
    "controlnet": of_controlnet,
    "vae": of_vae,
    "clip": of_clip,
    "open_clip": of_open_clip,
    "t5": of_t5,
    "bfl": of_bfl,
    "mmdit": of_mmdit,
}
"""The original names of a network's tensors, by the words of `Part.original`."""


class OriginalFile:
    """An open file in the original layout; what has been taken from it is remembered."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        self.names = frozenset(read_header(path))
        self._file = safe_open(path, "pt")
        self._left = set(self.names)

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.names)

    def network(
        self, part: str, like: dict[str, Any], config: dict[str, Any], original: tuple[tuple[str, str], ...]
    ) -> dict[str, Any]:
        """The tensors of a network by their names in diffusers. `like` has one of the right shape for each.

        Raises `InvalidRequest` for one that is missing or of another shape.
        """
        prefix, layout = next((each for each in original if self.has(each[0])), original[0])
        made = {name: self._found(part, name, prefix, LAYOUTS[layout](name, config), like[name]) for name in like}
        depths = [int(found[2]) for name in self._left if name.startswith(prefix) and (found := DEEPER.fullmatch(name))]
        known = config.get("num_hidden_layers")
        if known is not None and depths and min(depths) >= known:  # a text encoder that is read up to its last but one
            self._left -= {name for name in self._left if name.startswith(prefix) and DEEPER.fullmatch(name)}
        return made

    def check_all_used(self) -> None:
        """Raises `InvalidRequest` for tensors that nothing was made of, though they may mean something."""
        strange = sorted(name for name in self._left if name not in MARKERS and not NO_USE.fullmatch(name))
        if strange:
            raise InvalidRequest(
                f"{self.path} holds {some(strange)}, which the model that is described has no use for."
            )

    def _found(self, part: str, name: str, prefix: str, sources: list[Source], like: Any) -> Any:
        source = next((each for each in sources if prefix + each.name in self.names), None)
        if source is None:
            raise InvalidRequest(f"{self.path} has no {prefix}{sources[0].name}, which the {part} needs.")
        value = source.change(self._tensor(prefix + source.name))
        if value.shape != like.shape and value.squeeze().shape != like.squeeze().shape:
            raise InvalidRequest(
                f"{self.path} does not fit its configuration: {prefix}{source.name} is {_shape(value)}, and "
                f"{name} of the {part} is {_shape(like)}."
            )
        return value.reshape(like.shape)

    def _tensor(self, name: str) -> Any:
        self._left.discard(name)
        value = self._file.get_tensor(name)
        stem = name.rpartition(".")[0]
        for scale in SCALES:
            beside = f"{stem}.{scale}"
            if name.endswith(".weight") and beside in self.names:
                self._left.discard(beside)
                factor = self._file.get_tensor(beside).float()
                value = value.float() * (factor[:, None] if factor.dim() == 1 and factor.numel() > 1 else factor)
        return value


def empty_network(cls: str, folder: Path) -> Any:
    """A network without weights, as a configuration describes it."""
    import torch

    library, _, name = cls.partition(":")
    kind = getattr(importlib.import_module(library), name)
    try:
        with torch.device("meta"):
            if library == "transformers":
                return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            return kind.from_config(kind.load_config(folder, local_files_only=True))
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{folder / 'config.json'} describes no {name}: {gist(error)}.") from None


def markers_in(names: Iterator[str] | frozenset[str]) -> dict[str, Any]:
    """What a file says of how it was trained, as settings of a scheduler. Raises `InvalidRequest` for what cannot be
    followed."""
    for name in sorted(names):
        if FOREIGN.fullmatch(name):
            raise InvalidRequest(f"it holds {name}: that parametrisation, or network, is not supported.")
    return {setting: value for marker in MARKERS if marker in names for setting, value in MARKERS[marker].items()}


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _shape(tensor: Any) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
