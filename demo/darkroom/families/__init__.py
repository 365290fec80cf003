"""The contract of each network: what goes in, what comes out, in which shapes."""

from darkroom.checkpoint.folder import SDXL, Checkpoint
from darkroom.contract import Stage
from darkroom.families import stable_diffusion, stable_diffusion_xl


def stages(checkpoint: Checkpoint, guided: bool, clip_skip: int) -> dict[str, Stage]:
    """The contracts of a model's family. `clip_skip` counts text encoder layers left out at the end, as in diffusers.

    Text encoders are called clip and clip_2. With guidance and a clip_skip there are also clip_negative and
    clip_2_negative, because diffusers leaves out layers for the prompt alone. vae_encoder starts from a picture.
    """
    family = stable_diffusion_xl if checkpoint.family == SDXL else stable_diffusion
    return family.stages(checkpoint, guided, clip_skip)
