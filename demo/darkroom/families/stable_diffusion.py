"""The stages of Stable Diffusion 1.x and 2.x.

All of them speak of the user's batch: classifier-free guidance happens inside the UNet's graph, with a timestep
and a guidance scale for each image, so the doubled batch is nobody's business but the graph's.
"""

from darkroom.checkpoint.folder import Checkpoint
from darkroom.contract import GUIDANCE_SCALE, NEGATIVE, Stage, Tensor


def stages(checkpoint: Checkpoint, guided: bool, clip_skip: int) -> dict[str, Stage]:
    """
    clip:         input_ids (B, 77) int32 -> text_embeddings (B, 77, D)
    unet:         latents (B, 4, h, w), timestep (B,), text_embeddings (B, 77, D) -> output (B, 4, h, w);
                  guided, also negative_text_embeddings (B, 77, D) and guidance_scale (B,);
                  where guidance is embedded, guidance_scale (B,) alone
    vae:          latents (B, 4, h, w), scaled as the UNet has them -> images (B, 3, H, W) in [-1, 1]
    vae_encoder:  images (B, 3, H, W) in [-1, 1] -> moments (B, 8, h, w), unscaled
    """
    text = checkpoint.texts["text_encoder"]
    context = checkpoint.context("text_encoder")
    ids = Tensor("input_ids", ("B", context), "int32")
    embeddings = Tensor("text_embeddings", ("B", context, text["hidden_size"]))
    every = {"clip": Stage("clip", (ids,), (embeddings,), "text_encoder", {"clip_skip": clip_skip})}
    if guided and clip_skip:
        every["clip_negative"] = Stage("clip", (ids,), (embeddings,), "text_encoder", {"clip_skip": 0})
    return every | {"unet": unet(checkpoint, guided, (embeddings,))} | vae(checkpoint)


def unet(checkpoint: Checkpoint, guided: bool, conditions: tuple[Tensor, ...]) -> Stage:
    """The UNet's contract, with what the text encoders and the family condition it on."""
    latents = Tensor("latents", ("B", checkpoint.vae["latent_channels"], "h", "w"))
    steady = conditions
    if checkpoint.embeds_guidance:
        steady += (GUIDANCE_SCALE,)
    elif guided:
        steady += (*(Tensor(NEGATIVE + each.name, each.shape) for each in conditions), GUIDANCE_SCALE)
    return Stage(
        "unet",
        (latents, Tensor("timestep", ("B",)), *steady),
        (Tensor("output", latents.shape),),
        "unet",
        {"guided": guided},
        tuple(tensor.name for tensor in steady),
    )


def vae(checkpoint: Checkpoint) -> dict[str, Stage]:
    """The contracts of the autoencoder's two halves."""
    channels = checkpoint.vae["latent_channels"]
    latents = Tensor("latents", ("B", channels, "h", "w"))
    images = Tensor("images", ("B", 3, "H", "W"))
    moments = Tensor("moments", ("B", 2 * channels, "h", "w"))
    return {
        "vae": Stage("vae", (latents,), (images,), "vae"),
        "vae_encoder": Stage("vae_encoder", (images,), (moments,), "vae"),
    }
