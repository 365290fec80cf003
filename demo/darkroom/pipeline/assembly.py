"""Loaded engines -> a pipeline for a request: the last thing before pictures, and all it takes is known by then.

A process that has the artefacts and nothing else of a model puts together the same pipeline: see `Traits`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from darkroom.checkpoint.folder import SDXL, Checkpoint
from darkroom.contract import GUIDANCE_SCALE
from darkroom.engines.runtime import Engine
from darkroom.pipeline.pipeline import InitialImage, Pipeline, TextEncoder
from darkroom.request import Request
from darkroom.schedule.table import Table
from darkroom.text.clip import ClipTokenizer

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What diffusers tells SDXL's refiner that the picture is rated, and what guidance leads away from."""


@dataclass(frozen=True)
class Traits:
    """What of a model a run has to know beside its engines.

    `vae_factor`: pixels per latent, along each side. `zeros_for_empty_prompt`: SDXL was trained with zeros, not an
    empty prompt's embeddings, for guidance to lead away from.
    """

    family: str
    latent_channels: int
    vae_factor: int
    embeds_guidance: bool
    wants_aesthetic_score: bool
    zeros_for_empty_prompt: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Traits":
        return cls(
            family=checkpoint.family,
            latent_channels=checkpoint.vae["latent_channels"],
            vae_factor=checkpoint.vae_factor,
            embeds_guidance=checkpoint.embeds_guidance,
            wants_aesthetic_score=checkpoint.wants_aesthetic_score,
            zeros_for_empty_prompt=checkpoint.family == SDXL
            and checkpoint.index.get("force_zeros_for_empty_prompt", True),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def guided(self, request: Request) -> bool:
        """Whether the request takes a UNet with classifier-free guidance in its graph."""
        return request.guided and not self.embeds_guidance

    def added_conditions(self, request: Request, score: float) -> dict[str, np.ndarray]:
        """SDXL's sizes: of the picture that it is to look like a part of, the part's place, and the part's own; and
        the guidance scale for a UNet that embeds it."""
        added = {}
        if self.embeds_guidance:
            added[GUIDANCE_SCALE.name] = np.array(request.guidance_scale, np.float32)
        if self.family == SDXL:
            size = (request.height, request.width)
            last = (score,) if self.wants_aesthetic_score else size
            added["time_ids"] = np.array([*size, 0, 0, *last], np.float32)
        return added


def assemble(
    traits: Traits,
    encoders: tuple[TextEncoder, ...],
    unet: Engine,
    vae: Engine | None,
    table: Table,
    request: Request,
    start: InitialImage | None = None,
    guided: bool | None = None,
) -> Pipeline:
    """The pipeline that a request is run through. A `guided` UNet takes requests without guidance too: at a scale of 1
    the picture without it comes out. By default the UNet is the one that the request takes."""
    guided = traits.guided(request) if guided is None else guided
    return Pipeline(
        encoders=encoders,
        unet=unet,
        vae=vae,
        table=table,
        latent_shape=(
            traits.latent_channels,
            request.height // traits.vae_factor,
            request.width // traits.vae_factor,
        ),
        guidance_scale=(request.guidance_scale if request.guided else 1.0) if guided else None,
        negative_prompt=request.negative_prompt or "",
        zero_negative=request.negative_prompt is None and traits.zeros_for_empty_prompt,
        added=traits.added_conditions(request, AESTHETIC_SCORE),
        added_negative=traits.added_conditions(request, NEGATIVE_AESTHETIC_SCORE),
        start=start,
    )


def text_encoders(tokenizers: list[ClipTokenizer], loaded: dict[str, Engine]) -> tuple[TextEncoder, ...]:
    """The text encoders among loaded engines, in the order of their embeddings."""
    names = [name for name in ("clip", "clip_2") if name in loaded]
    return tuple(
        TextEncoder(tokenizer, loaded[name], loaded.get(f"{name}_negative", loaded[name]))
        for tokenizer, name in zip(tokenizers, names, strict=True)
    )
