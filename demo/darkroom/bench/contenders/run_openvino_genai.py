"""OpenVINO GenAI: the whole pipeline in C++, reshaped to one size, compiled once and cached."""

from pathlib import Path
from typing import Any

from protocol import Clock, Make, Settings, serve

CACHE = ".cache-openvino-genai"
"""Hidden: the rest of a conversion's folder stays as it was made."""

SCHEDULERS = {
    "DDIMScheduler": "DDIM",
    "EulerDiscreteScheduler": "EULER_DISCRETE",
    "EulerAncestralDiscreteScheduler": "EULER_ANCESTRAL_DISCRETE",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS_DISCRETE",
    "PNDMScheduler": "PNDM",
}
"""diffusers' classes, and what GenAI calls those of them that it has."""


def load(settings: Settings) -> Make:
    import openvino_genai as genai

    properties: dict[str, Any] = {"CACHE_DIR": str(Path(settings.model) / CACHE)}
    if settings.precision:
        properties["INFERENCE_PRECISION_HINT"] = settings.precision
    if settings.threads:
        properties["INFERENCE_NUM_THREADS"] = settings.threads
    pipeline = genai.Text2ImagePipeline(settings.model)
    if settings.scheduler:
        pipeline.set_scheduler(_scheduler(genai, settings))
    pipeline.reshape(settings.batch_size, settings.height, settings.width, settings.guidance_scale)
    pipeline.compile("CPU", **properties)
    return _contender(genai, pipeline, settings)


def _scheduler(genai: Any, settings: Settings) -> Any:
    if settings.scheduler not in SCHEDULERS:
        raise ValueError(f"OpenVINO GenAI has no {settings.scheduler}, only {', '.join(SCHEDULERS)}")
    kind = getattr(genai.Scheduler.Type, SCHEDULERS[settings.scheduler])
    return genai.Scheduler.from_config(Path(settings.model) / "scheduler" / "scheduler_config.json", kind)


def _contender(genai: Any, pipeline: Any, settings: Settings) -> Make:
    noise = settings.noise()
    generator_of = _generators(genai, noise) if noise is not None else genai.CppStdGenerator
    named: dict[str, Any] = {"negative_prompt": settings.negative_prompt} if settings.guidance_scale > 1 else {}

    def make(clock: Clock) -> Any:
        made = pipeline.generate(
            settings.prompt,
            **named,
            num_images_per_prompt=settings.batch_size,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.denoising_steps,
            guidance_scale=settings.guidance_scale,
            generator=generator_of(settings.seed),
        ).data
        said = pipeline.get_performance_metrics()
        clock.add("CLIP", sum(said.get_text_encoder_infer_duration().values()))
        calls = said.raw_metrics.unet_inference_durations
        clock.add("UNet", sum(calls) / 1000, len(calls))
        clock.add("VAE-Dec", said.get_vae_decoder_infer_duration())
        return made

    return make


def _generators(genai: Any, noise: Any) -> Any:
    """A class of generators that serve this noise first, (B, 4, h, w), and then what their seed gives."""
    import numpy as np
    import openvino

    class Served(genai.Generator):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self._served = False
            self._more = np.random.RandomState(seed & 0xFFFFFFFF)

        def next(self) -> float:
            return float(self._more.standard_normal())

        def randn_tensor(self, shape: Any) -> Any:
            if not self._served and tuple(shape) == noise.shape:
                self._served = True
                return openvino.Tensor(noise.copy())  # GenAI scales it where it lies
            return openvino.Tensor(self._more.standard_normal(tuple(shape)).astype(np.float32))

    return Served


if __name__ == "__main__":
    serve(load)
