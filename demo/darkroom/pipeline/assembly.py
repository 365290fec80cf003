"""Loaded engines -> a pipeline for a request: the last thing before pictures, and all it takes is known by then.

A process that has the artefacts and nothing else of a model puts together the same pipeline: see `Traits`.
"""

from darkroom.engines.runtime import Engine
from darkroom.families import find_family
from darkroom.families.family import Traits
from darkroom.pipeline.pipeline import InitialImage, Pipeline, TextEncoder
from darkroom.request import Request
from darkroom.schedule.table import Table
from darkroom.text.reading import Reading
from darkroom.text.tokenizer import Tokenizer


def assemble(
    traits: Traits,
    encoders: tuple[TextEncoder, ...],
    denoiser: Engine,
    vae: Engine | None,
    table: Table,
    request: Request,
    start: InitialImage | None = None,
    guided: bool | None = None,
    chunks: int = 1,
) -> Pipeline:
    """The pipeline that a request is run through. `chunks` are what the denoiser's engine takes of a prompt. A `guided`
    denoiser takes requests without guidance too: at a scale of 1 the picture without it comes out. By default the
    denoiser is the one that the request takes."""
    guided = traits.guided(request) if guided is None else guided
    family = find_family(traits.family)
    return Pipeline(
        encoders=encoders,
        denoiser=denoiser,
        vae=vae,
        table=table,
        latent_shape=(
            traits.latent_channels,
            request.height // traits.vae_factor,
            request.width // traits.vae_factor,
        ),
        guidance_scale=(request.guidance_scale if request.guided else 1.0) if guided else None,
        reading=Reading.of(request),
        chunks=chunks,
        zero_negative=(request.negative_prompt, request.negative_prompt_2) == (None, None)
        and traits.zeros_for_empty_prompt,
        added=family.conditions(traits, request),
        added_negative=family.conditions(traits, request, negative=True),
        start=start,
        rows=traits.rows,
    )


def text_encoders(traits: Traits, tokenizers: list[Tokenizer], loaded: dict[str, Engine]) -> tuple[TextEncoder, ...]:
    """The text encoders among loaded engines, in the order in which prompts are read."""
    return tuple(
        TextEncoder(tokenizer, loaded[name], loaded.get(f"{name}_negative", loaded[name]))
        for tokenizer, name in zip(tokenizers, traits.texts, strict=True)
    )
