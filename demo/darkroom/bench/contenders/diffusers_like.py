"""What diffusers' own pipeline and those that take its place have in common: their stages, and how one calls them."""

import json
from pathlib import Path
from typing import Any

import torch
from protocol import Clock, Make, Settings

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def silence() -> None:
    """No bars of progress, neither while a model is loaded nor while it runs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def no_safety_checker(model: str) -> dict[str, None]:
    """What `from_pretrained` is told, so that a model's safety checker is not loaded: no other contender has one."""
    parts = json.loads((Path(model) / "model_index.json").read_text(encoding="utf-8"))
    return {"safety_checker": None} if "safety_checker" in parts else {}


def use_scheduler(pipeline: Any, settings: Settings) -> None:
    """Exchanges the model's scheduler for the one that was asked for, with the model's configuration."""
    if settings.scheduler:
        import diffusers

        pipeline.scheduler = getattr(diffusers, settings.scheduler).from_config(pipeline.scheduler.config)


def contender(pipeline: Any, settings: Settings) -> Make:
    """Makes batches with a pipeline that is ready, its networks' calls timed."""
    pipeline.set_progress_bar_config(disable=True)
    current = Clock()

    def timed(owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            with current.time(stage):
                return function(*arguments, **named)

        setattr(owner, name, call)

    for name in TEXT_ENCODERS:
        if encoder := getattr(pipeline, name, None):
            timed(encoder, "forward", "CLIP")
    timed(pipeline.unet, "forward", "UNet")
    timed(pipeline.vae, "decode", "VAE-Dec")
    noise = settings.noise()

    def make(clock: Clock) -> Any:
        nonlocal current
        current = clock
        generators = [torch.Generator("cpu").manual_seed(settings.seed + i) for i in range(settings.batch_size)]
        return pipeline(
            settings.prompt,
            negative_prompt=settings.negative_prompt,
            num_images_per_prompt=settings.batch_size,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.denoising_steps,
            guidance_scale=settings.guidance_scale,
            generator=generators,
            latents=None if noise is None else torch.from_numpy(noise),
            output_type="np",
        ).images

    return make
