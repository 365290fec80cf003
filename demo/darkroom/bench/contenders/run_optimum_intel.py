"""optimum-intel: diffusers' pipeline over OpenVINO, its networks reshaped to one size, compiled once and cached."""

from pathlib import Path
from typing import Any

from protocol import Make, Settings, serve

CACHE = ".cache-optimum-intel"
"""Hidden: the rest of a conversion's folder stays as it was made."""


def load(settings: Settings) -> Make:
    import torch
    from diffusers_like import contender, no_safety_checker, silence, use_scheduler
    from optimum.intel import OVDiffusionPipeline

    properties: dict[str, Any] = {"CACHE_DIR": str(Path(settings.model) / CACHE)}
    if settings.precision:
        properties["INFERENCE_PRECISION_HINT"] = settings.precision
    if settings.threads:
        torch.set_num_threads(settings.threads)
        properties["INFERENCE_NUM_THREADS"] = str(settings.threads)
    silence()
    pipeline = OVDiffusionPipeline.from_pretrained(
        settings.model, compile=False, dynamic_shapes=False, ov_config=properties, **no_safety_checker(settings.model)
    )
    use_scheduler(pipeline, settings)
    pipeline.reshape(1, settings.height, settings.width, settings.batch_size)
    if settings.guidance_scale <= 1:
        _without_guidance(pipeline.unet.model, settings.batch_size)
    pipeline.compile()
    return contender(pipeline, settings)


def _without_guidance(unet: Any, batch_size: int) -> None:
    """`reshape` always counts on guidance, which doubles the UNet's batch."""
    shapes = {port: port.partial_shape for port in unet.inputs if port.any_name != "timestep"}
    for shape in shapes.values():
        shape[0] = batch_size
    unet.reshape(shapes)


if __name__ == "__main__":
    serve(load)
