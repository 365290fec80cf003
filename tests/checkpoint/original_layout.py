"""Writes a diffusers folder's networks as one file in the original layout of Stable Diffusion and SDXL.

The names are those of CompVis' and Stability's published checkpoints. The networks here have two levels with one layer
each, attention where the tests' tiny models have it.
"""

from pathlib import Path
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original(pipeline: Any) -> dict[str, Any]:
    """All tensors of a diffusers pipeline under their original names."""
    xl = hasattr(pipeline, "text_encoder_2")
    tensors = {f"model.diffusion_model.{name}": value for name, value in _unet(pipeline.unet).items()}
    tensors |= {
        f"first_stage_model.{name}": value
        for name, value in vae_tensors(pipeline.vae.state_dict(), len(pipeline.vae.encoder.down_blocks)).items()
    }
    first = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    for name, value in pipeline.text_encoder.state_dict().items():
        tensors[f"{first}text_model.{name.removeprefix('text_model.')}"] = value
    if xl:
        second = _open_clip(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def original_sd3(pipeline: Any) -> dict[str, Any]:
    """The same of a Stable Diffusion 3, as ComfyUI and Stability AI publish it with its text encoders."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in mmdit(pipeline.transformer).items()}
    vae = vae_tensors(pipeline.vae.state_dict(), len(pipeline.vae.encoder.down_blocks))
    tensors |= {f"first_stage_model.{name}": value for name, value in vae.items()}
    for clip, encoder in (("clip_l", pipeline.text_encoder), ("clip_g", pipeline.text_encoder_2)):
        for name, value in encoder.state_dict().items():
            model = "" if name.startswith(("text_model.", "text_projection.")) else "text_model."
            tensors[f"text_encoders.{clip}.transformer.{model}{name}"] = value
    t5 = pipeline.text_encoder_3.state_dict().items()
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": value for name, value in t5 if "embed_tokens" not in name}
    return {name: value.clone() for name, value in tensors.items()}


def mmdit(transformer: Any) -> dict[str, Any]:
    """The tensors of Stable Diffusion 3's transformer under their original names."""
    import torch

    state = transformer.state_dict()
    made = {"pos_embed": state["pos_embed.pos_embed"]}
    swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    last = len(transformer.transformer_blocks) - 1
    for block in range(last + 1):
        ours, theirs = f"transformer_blocks.{block}", f"joint_blocks.{block}"
        for side, context, place, out, norm in (
            ("x_block", "", "{}.to_{}", "to_out.0", "norm_{}"),
            ("context_block", "_context", "{}.add_{}_proj", "to_add_out", "norm_added_{}"),
        ):
            names[f"{ours}.ff{context}.net.0.proj"] = f"{theirs}.{side}.mlp.fc1"
            names[f"{ours}.ff{context}.net.2"] = f"{theirs}.{side}.mlp.fc2"
            modulations = swapped if context and block == last else names
            modulations[f"{ours}.norm1{context}.linear"] = f"{theirs}.{side}.adaLN_modulation.1"
            for attention in ("attn", "attn2"):
                names[f"{ours}.{attention}.{out}"] = f"{theirs}.{side}.{attention}.proj"
                for each in "qk":
                    names[f"{ours}.{attention}.{norm.format(each)}"] = f"{theirs}.{side}.{attention}.ln_{each}"
                for kind in ("weight", "bias"):
                    parts = [f"{ours}.{place.format(attention, each)}.{kind}" for each in "qkv"]
                    if parts[0] in state:
                        made[f"{theirs}.{side}.{attention}.qkv.{kind}"] = torch.cat([state[part] for part in parts])
    for kind in ("weight", "bias"):
        made |= {f"{its}.{kind}": state[f"{own}.{kind}"] for own, its in names.items() if f"{own}.{kind}" in state}
        for own, its in swapped.items():
            made[f"{its}.{kind}"] = torch.cat(state[f"{own}.{kind}"].chunk(2)[::-1])
    return made


def original_flux(pipeline: Any) -> dict[str, Any]:
    """The same of a Flux.1, as ComfyUI publishes it with its text encoders."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in bfl(pipeline.transformer).items()}
    vae = vae_tensors(pipeline.vae.state_dict(), len(pipeline.vae.encoder.down_blocks))
    tensors |= {f"vae.{name}": value for name, value in vae.items()}
    for name, value in pipeline.text_encoder.state_dict().items():
        tensors[f"text_encoders.clip_l.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    t5 = pipeline.text_encoder_2.state_dict().items()
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": value for name, value in t5 if "embed_tokens" not in name}
    return {name: value.clone() for name, value in tensors.items()}


def bfl(transformer: Any) -> dict[str, Any]:
    """The tensors of Flux's transformer under the names of Black Forest Labs."""
    import torch

    state, made = transformer.state_dict(), {}
    names = {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"}
    for ours, theirs in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector")):
        for number, layer in ((1, "in_layer"), (2, "out_layer")):
            names[f"time_text_embed.{ours}_embedder.linear_{number}"] = f"{theirs}_in.{layer}"
    fused = {}
    for block in range(len(transformer.transformer_blocks)):
        ours, theirs = f"transformer_blocks.{block}", f"double_blocks.{block}"
        for side, context, place, out, norm in (
            ("img", "", "to_{}", "to_out.0", "norm_{}"),
            ("txt", "_context", "add_{}_proj", "to_add_out", "norm_added_{}"),
        ):
            names[f"{ours}.norm1{context}.linear"] = f"{theirs}.{side}_mod.lin"
            names[f"{ours}.ff{context}.net.0.proj"] = f"{theirs}.{side}_mlp.0"
            names[f"{ours}.ff{context}.net.2"] = f"{theirs}.{side}_mlp.2"
            names[f"{ours}.attn.{out}"] = f"{theirs}.{side}_attn.proj"
            fused[f"{theirs}.{side}_attn.qkv"] = [f"{ours}.attn.{place.format(each)}" for each in "qkv"]
            for each, word in (("q", "query"), ("k", "key")):
                weight = state[f"{ours}.attn.{norm.format(each)}.weight"]
                made[f"{theirs}.{side}_attn.norm.{word}_norm.scale"] = weight
    for block in range(len(transformer.single_transformer_blocks)):
        ours, theirs = f"single_transformer_blocks.{block}", f"single_blocks.{block}"
        names |= {f"{ours}.norm.linear": f"{theirs}.modulation.lin", f"{ours}.proj_out": f"{theirs}.linear2"}
        fused[f"{theirs}.linear1"] = [*(f"{ours}.attn.to_{each}" for each in "qkv"), f"{ours}.proj_mlp"]
        for each, word in (("q", "query"), ("k", "key")):
            made[f"{theirs}.norm.{word}_norm.scale"] = state[f"{ours}.attn.norm_{each}.weight"]
    for kind in ("weight", "bias"):
        made |= {f"{its}.{kind}": state[f"{own}.{kind}"] for own, its in names.items() if f"{own}.{kind}" in state}
        made |= {f"{its}.{kind}": torch.cat([state[f"{each}.{kind}"] for each in own]) for its, own in fused.items()}
        last = state[f"norm_out.linear.{kind}"]
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat(last.chunk(2)[::-1])
    return made


def write(pipeline: Any, path: Path) -> Path:
    from safetensors.torch import save_file

    kind = type(pipeline).__name__
    layouts = {"FluxPipeline": original_flux, "StableDiffusion3Pipeline": original_sd3}
    save_file(layouts.get(kind, original)(pipeline), path)
    return path


def _unet(unet: Any) -> dict[str, Any]:
    attention_first = bool(getattr(unet.up_blocks[0], "attentions", None))
    names = UNET | {"up_blocks.0.upsamplers.0.conv": f"output_blocks.1.{1 + attention_first}.conv"}
    made = {}
    for name, value in unet.state_dict().items():
        block = max((known for known in names if name.startswith(f"{known}.")), key=len)
        rest = name.removeprefix(f"{block}.")
        if ".resnets." in f".{block}":
            part, _, end = rest.partition(".")
            rest = f"{RESNET[part]}.{end}"
        made[f"{names[block]}.{rest}"] = value
    return made


def vae_tensors(tensors: dict[str, Any], levels: int) -> dict[str, Any]:
    """The tensors of an AutoencoderKL with so many levels, under their original names."""
    made = {}
    for name, value in tensors.items():
        for half, blocks in (("encoder", "down"), ("decoder", "up")):
            for level in range(levels):
                place = level if blocks == "down" else levels - 1 - level
                name = name.replace(f"{half}.{blocks}_blocks.{level}.", f"{half}.{blocks}_.{place}.")
        name = name.replace(".down_.", ".down.").replace(".up_.", ".up.").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("conv_norm_out", "norm_out").replace(".resnets.", ".block.")
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        for index in (0, 1):
            name = name.replace(f"mid_block.block.{index}", f"mid.block_{index + 1}")
        if "mid_block.attentions.0." in name:
            for ours, theirs in VAE_ATTENTION.items():
                name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            if name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight")):
                value = value[:, :, None, None]  # 1x1 convolutions there
        made[name] = value
    return made


def _open_clip(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    made = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    layer = 0
    while f"text_model.encoder.layers.{layer}.layer_norm1.weight" in state:
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for mine, its in OPEN_CLIP.items():
                made[f"{theirs}{its}.{kind}"] = state[f"{ours}{mine}.{kind}"]
            parts = [state[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
        layer += 1
    return made
