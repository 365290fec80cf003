"""Loaded engines -> a pipeline for a request: the last thing before pictures, and all it takes is known by then.

A process that has the artefacts and nothing else of a model puts together the same pipeline: see `Traits`.
"""

from collections.abc import Sequence

import numpy as np

from darkroom.contract import CONTROL_FROM, CONTROL_SCALES, CONTROL_UNTIL, CONTROLS
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
    controls: Sequence[np.ndarray] = (),
) -> Pipeline:
    """The pipeline that a request is run through. `chunks` are what the denoiser's engine takes of a prompt. A `guided`
    denoiser takes requests without guidance too: at a scale of 1 the picture without it comes out. By default the
    denoiser is the one that the request takes. `controls` are the maps (H, W, 3) uint8 of the request's ControlNets."""
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
        common=_controlled(request, table, controls),
        inpaints=traits.inpaints,
        start=start,
        rows=traits.rows,
    )


def _controlled(request: Request, table: Table, maps: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What ControlNets are given of the maps (H, W, 3) uint8 of a request: see `contract.CONTROLS`.

    A ControlNet counts in the calls that lie within its share of all of them, as in diffusers. Its bounds lie halfway
    between their timesteps and those of their neighbours, where no rounding blurs them.
    """
    if not maps:
        return {}
    given = {name: each.transpose(2, 0, 1).astype(np.float32) / 255 for name, each in zip(CONTROLS, maps, strict=False)}
    bounds, calls, times = [], len(table), np.asarray(table.timesteps, np.float32)
    for control in request.controls:
        counts = [call for call in range(calls) if call / calls >= control.start and (call + 1) / calls <= control.end]
        if not counts:
            bounds.append((-1.0, -1.0))
            continue
        first, last = counts[0], counts[-1]
        upper = times[0] + 1 if first == 0 else (times[first] + times[first - 1]) / 2
        lower = times[-1] - 1 if last == calls - 1 else (times[last] + times[last + 1]) / 2
        bounds.append((upper, lower))
    scales = [control.scale for control in request.controls]
    rows = (scales, *zip(*bounds, strict=True))
    return given | {
        name: np.array(row, np.float32)
        for name, row in zip((CONTROL_SCALES, CONTROL_FROM, CONTROL_UNTIL), rows, strict=True)
    }


def text_encoders(traits: Traits, tokenizers: list[Tokenizer], loaded: dict[str, Engine]) -> tuple[TextEncoder, ...]:
    """The text encoders among loaded engines, in the order in which prompts are read."""
    return tuple(
        TextEncoder(tokenizer, loaded[name], loaded.get(f"{name}_negative", loaded[name]))
        for tokenizer, name in zip(tokenizers, traits.texts, strict=True)
    )
