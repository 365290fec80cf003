"""The stages of SDXL (Podell et al. 2023): two text encoders, and a UNet that is told sizes and the prompt's gist."""

from darkroom.checkpoint import Checkpoint
from darkroom.stages.contract import Stage, Tensor
from darkroom.stages.stable_diffusion import unet, vae

TIME_IDS = 6
"""Original height and width, top and left of the crop, target height and width."""


def stages(checkpoint: Checkpoint, guided: bool, clip_skip: int) -> dict[str, Stage]:
    """
    clip:    input_ids (B, 77) int32 -> text_embeddings (B, 77, D1), of the layer before the last
    clip_2:  input_ids (B, 77) int32 -> text_embeddings (B, 77, D2), pooled_embeddings (B, P)
    unet:    as for Stable Diffusion, on text_embeddings (B, 77, D1 + D2), pooled_embeddings (B, P) and time_ids
             (B, 6); guided, also on all three with the prefix negative_
    """
    every, width = {}, 0
    for name, (part, text) in zip(("clip", "clip_2"), checkpoint.texts.items(), strict=True):
        context = text["max_position_embeddings"]
        width += text["hidden_size"]
        pooled = Tensor("pooled_embeddings", ("B", text["projection_dim"]))
        ids = Tensor("input_ids", ("B", context), "int32")
        outputs = (Tensor("text_embeddings", ("B", context, text["hidden_size"])), pooled)[: 1 + (name == "clip_2")]
        every[name] = Stage(name, (ids,), outputs, part, {"clip_skip": clip_skip, "penultimate": True})
        if guided and clip_skip:
            every[f"{name}_negative"] = Stage(name, (ids,), outputs, part, {"clip_skip": 0, "penultimate": True})
    conditions = (Tensor("text_embeddings", ("B", context, width)), pooled, Tensor("time_ids", ("B", TIME_IDS)))
    return every | {"unet": unet(checkpoint, guided, conditions)} | vae(checkpoint)
