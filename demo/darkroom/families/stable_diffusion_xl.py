"""The stages of SDXL (Podell et al. 2023): two text encoders, and a UNet that is told sizes and the prompt's gist."""

from darkroom.checkpoint.folder import Checkpoint
from darkroom.contract import Stage, Tensor
from darkroom.families.stable_diffusion import unet, vae

ENGINES = {"text_encoder": "clip", "text_encoder_2": "clip_2"}
"""What the stages of the two text encoders are called; the refiner has the second alone."""

SIZES, SIZES_AND_SCORE = 6, 5
"""Original height and width, top and left of the crop; then target height and width, or an aesthetic score."""


def stages(checkpoint: Checkpoint, guided: bool, clip_skip: int) -> dict[str, Stage]:
    """
    clip:    input_ids (B, 77) int32 -> text_embeddings (B, 77, D1), of the layer before the last
    clip_2:  input_ids (B, 77) int32 -> text_embeddings (B, 77, D2), pooled_embeddings (B, P)
    unet:    as for Stable Diffusion, on text_embeddings (B, 77, D1 + D2), pooled_embeddings (B, P) and time_ids
             (B, 6), or (B, 5) for the refiner; guided, also on all three with the prefix negative_
    """
    every, width = {}, 0
    for part, text in checkpoint.texts.items():
        name = ENGINES[part]
        context = checkpoint.context(part)
        width += text["hidden_size"]
        pooled = Tensor("pooled_embeddings", ("B", text["projection_dim"]))
        ids = Tensor("input_ids", ("B", context), "int32")
        outputs = (Tensor("text_embeddings", ("B", context, text["hidden_size"])), pooled)[: 1 + (name == "clip_2")]
        every[name] = Stage(name, (ids,), outputs, part, {"clip_skip": clip_skip, "penultimate": True})
        if guided and clip_skip:
            every[f"{name}_negative"] = Stage(name, (ids,), outputs, part, {"clip_skip": 0, "penultimate": True})
    time_ids = Tensor("time_ids", ("B", SIZES_AND_SCORE if checkpoint.wants_aesthetic_score else SIZES))
    conditions = (Tensor("text_embeddings", ("B", context, width)), pooled, time_ids)
    return every | {"unet": unet(checkpoint, guided, conditions)} | vae(checkpoint)
