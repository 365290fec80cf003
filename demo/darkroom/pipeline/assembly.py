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
    common, scales_by_call = _controlled(request, table, controls)
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
        common=common,
        scales_by_call=scales_by_call,
        inpaints=traits.inpaints,
        start=start,
        rows=traits.rows,
    )


def _controlled(
    request: Request, table: Table, maps: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """What ControlNets are given of the maps (H, W, 3) uint8 of a request: see `contract.CONTROLS`; and where their
    timesteps do not tell the calls in which they count, the scales of each call, (calls, K).

    A ControlNet counts in the calls that lie within its share of all of them, as in diffusers. Its bounds lie halfway
    between their timesteps and those of their neighbours, where no rounding blurs them. Schedulers that call a network
    twice at a timestep, as PNDM and Heun do, may have a neighbour at the same.
    """
    if not maps:
        return {}, None
    given = {name: each.transpose(2, 0, 1).astype(np.float32) / 255 for name, each in zip(CONTROLS, maps, strict=False)}
    times, calls = np.asarray(table.timesteps, np.float32), np.arange(len(table))
    everywhere = times.max() + 1, times.min() - 1
    around = np.concatenate([everywhere[:1], (times[1:] + times[:-1]) / 2, everywhere[1:]])
    bounds, counts = [], []
    for control in request.controls:
        within = (calls / len(table) >= control.start) & ((calls + 1) / len(table) <= control.end)
        counts.append(within)
        found = calls[within]
        bounds.append((around[found[0]], around[found[-1] + 1]) if len(found) else (-1.0, -1.0))
    scales = np.array([control.scale for control in request.controls], np.float32)
    of_call, by_time = np.stack(counts, axis=1), [(times <= first) & (times >= last) for first, last in bounds]
    told = np.array_equal(of_call, np.stack(by_time, axis=1))
    rows = (scales, *zip(*(bounds if told else [everywhere] * len(bounds)), strict=True))
    for name, row in zip((CONTROL_SCALES, CONTROL_FROM, CONTROL_UNTIL), rows, strict=True):
        given[name] = np.array(row, np.float32)
    return given, None if told else scales * of_call


def text_encoders(traits: Traits, tokenizers: list[Tokenizer], loaded: dict[str, Engine]) -> tuple[TextEncoder, ...]:
    """The text encoders among loaded engines, in the order in which prompts are read."""
    return tuple(
        TextEncoder(tokenizer, loaded[name], loaded.get(f"{name}_negative", loaded[name]))
        for tokenizer, name in zip(tokenizers, traits.texts, strict=True)
    )
