"""OpenVINO GenAI: the whole pipeline in C++, reshaped to one size, compiled once and cached."""

from pathlib import Path
from typing import Any

from protocol import Clock, Make, Settings, serve

CACHE = ".cache-openvino-genai"
"""Hidden: the rest of a conversion's folder stays as it was made."""


def load(settings: Settings) -> Make:
    import openvino_genai as genai

    properties: dict[str, Any] = {"CACHE_DIR": str(Path(settings.model) / CACHE)}
    if settings.precision:
        properties["INFERENCE_PRECISION_HINT"] = settings.precision
    if settings.threads:
        properties["INFERENCE_NUM_THREADS"] = settings.threads
    pipeline = genai.Text2ImagePipeline(settings.model)
    pipeline.reshape(settings.batch_size, settings.height, settings.width, settings.guidance_scale)
    pipeline.compile("CPU", **properties)
    return _contender(genai, pipeline, settings)


def _contender(genai: Any, pipeline: Any, settings: Settings) -> Make:
    import numpy as np

    generator_of = _generators(genai, np.load(settings.latents)) if settings.latents else genai.CppStdGenerator

    def make(clock: Clock, settings: Settings) -> Any:
        made = pipeline.generate(
            settings.prompt,
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
