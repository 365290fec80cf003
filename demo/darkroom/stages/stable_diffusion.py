"""The stages of Stable Diffusion 1.x and 2.x.

All of them speak of the user's batch: classifier-free guidance happens inside the UNet's graph, with a timestep
and a guidance scale for each image, so the doubled batch is nobody's business but the graph's.
"""

from darkroom.checkpoint import Checkpoint
from darkroom.stages.contract import Stage, Tensor


def stages(checkpoint: Checkpoint, guided: bool, clip_skip: int) -> dict[str, Stage]:
    """The contracts for one model. `clip_skip` counts text encoder layers left out at the end, as in diffusers.

    Text to image runs clip, unet and vae; with guidance and a clip_skip also clip_negative, because diffusers leaves
    out layers for the prompt alone.

    clip:         input_ids (B, 77) int32 -> text_embeddings (B, 77, D)
    unet:         latents (B, 4, h, w), timestep (B,), text_embeddings (B, 77, D) -> output (B, 4, h, w);
                  guided, also negative_embeddings (B, 77, D) and guidance_scale (B,)
    vae:          latents (B, 4, h, w), scaled as the UNet has them -> images (B, 3, H, W) in [-1, 1]
    vae_encoder:  images (B, 3, H, W) in [-1, 1] -> moments (B, 8, h, w), unscaled
    """
    context = checkpoint.text["max_position_embeddings"]
    width = checkpoint.text["hidden_size"]
    channels = checkpoint.vae["latent_channels"]
    latents = Tensor("latents", ("B", channels, "h", "w"))
    text = Tensor("text_embeddings", ("B", context, width))
    images = Tensor("images", ("B", 3, "H", "W"))
    steady = [text]
    if guided:
        steady += [Tensor("negative_embeddings", text.shape), Tensor("guidance_scale", ("B",))]
    unet_inputs = (latents, Tensor("timestep", ("B",)), *steady)
    unet_output = Tensor("output", latents.shape)
    ids = Tensor("input_ids", ("B", context), "int32")
    moments = Tensor("moments", ("B", 2 * channels, "h", "w"))
    every = {
        "clip": Stage("clip", (ids,), (text,), "text_encoder", {"clip_skip": clip_skip}),
        "unet": Stage(
            "unet", unet_inputs, (unet_output,), "unet", {"guided": guided}, tuple(tensor.name for tensor in steady)
        ),
        "vae": Stage("vae", (latents,), (images,), "vae"),
        "vae_encoder": Stage("vae_encoder", (images,), (moments,), "vae"),
    }
    if guided and clip_skip:
        every["clip_negative"] = Stage("clip", (ids,), (text,), "text_encoder", {"clip_skip": 0})
    return every
