"""diffusers' own pipeline, eager or compiled, and those that take its networks' place: see `KINDS`."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from protocol import Clock, Make, Settings, serve

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
CACHE = ".cache-optimum-intel"
"""Hidden: the rest of a conversion's folder stays as it was made."""


def diffusers(settings: Settings, named: dict[str, Any]) -> Any:
    """On a GPU where torch finds one; compiled as its documentation says ("Accelerate inference")."""
    from diffusers import DiffusionPipeline

    # PyTorch's own precision is float32, and files in float16 are no reason to leave it: the others' pictures are held
    # against these, so that convolutions are in float32 on a GPU, too.
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(settings.model, torch_dtype=dtype, **named).to(device)
    # Documented as faster, and measured here: up to a sixth of the UNet's time.
    if settings.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if settings.compile:
        # Happens in the first batch. The loop over the steps and the scheduler stay Python, as everywhere.
        pipeline.fuse_qkv_projections()
        how = {"mode": settings.compile, "fullgraph": True}
        pipeline.unet.forward = torch.compile(pipeline.unet.forward, **how)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, **how)
    return pipeline


def onnxruntime(settings: Settings, named: dict[str, Any]) -> Any:
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTDiffusionPipeline

    options = SessionOptions()
    if settings.threads:
        options.intra_op_num_threads = settings.threads
    named |= {"provider": "CPUExecutionProvider", "session_options": options}
    return ORTDiffusionPipeline.from_pretrained(settings.model, **named)


def openvino(settings: Settings, named: dict[str, Any]) -> Any:
    """Its networks reshaped to one size, compiled once and cached."""
    from optimum.intel import OVDiffusionPipeline

    properties: dict[str, Any] = {"CACHE_DIR": str(Path(settings.model) / CACHE)}
    if settings.precision:
        properties["INFERENCE_PRECISION_HINT"] = settings.precision
    if settings.threads:
        properties["INFERENCE_NUM_THREADS"] = str(settings.threads)
    pipeline = OVDiffusionPipeline.from_pretrained(
        settings.model, compile=False, dynamic_shapes=False, ov_config=properties, **named
    )
    pipeline.reshape(1, settings.height, settings.width, settings.batch_size)
    if settings.guidance_scale <= 1:
        # `reshape` always counts on guidance, which doubles the UNet's batch.
        unet = pipeline.unet.model
        shapes = {port: port.partial_shape for port in unet.inputs if port.any_name != "timestep"}
        for shape in shapes.values():
            shape[0] = settings.batch_size
        unet.reshape(shapes)
    pipeline.compile()
    return pipeline


KINDS = {"diffusers": diffusers, "onnxruntime": onnxruntime, "openvino": openvino}
"""Of which the last two are Optimum's."""


def load(settings: Settings) -> Make:
    import diffusers
    import transformers

    if settings.threads:
        torch.set_num_threads(settings.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # A safety checker is not loaded: no other contender has one.
    parts = json.loads((Path(settings.model) / "model_index.json").read_text(encoding="utf-8"))
    return contender(KINDS[settings.kind](settings, {"safety_checker": None} if "safety_checker" in parts else {}))


def contender(pipeline: Any) -> Make:
    """Makes batches with a pipeline that is ready, its networks' calls timed."""
    pipeline.set_progress_bar_config(disable=True)
    on_gpu = pipeline.device.type == "cuda"
    marks: list[tuple[str, Any, Any]] = []

    def mark() -> Any:
        """In the device's stream, or on the CPU by the host's clock."""
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            start = mark()
            made = function(*arguments, **named)
            marks.append((stage, start, mark()))
            return made

        setattr(owner, name, call)

    for name in TEXT_ENCODERS:
        if encoder := getattr(pipeline, name, None):
            timed(encoder, "forward", "CLIP")
    timed(pipeline.unet, "forward", "UNet")
    timed(pipeline.vae, "decode", "VAE-Dec")

    def make(clock: Clock, settings: Settings) -> Any:
        marks.clear()
        generators = [torch.Generator("cpu").manual_seed(settings.seed + i) for i in range(settings.batch_size)]
        with mock.patch.object(torch, "randn", _randn) if settings.precision == "bf16" else nullcontext():
            images = pipeline(
                settings.prompt,
                num_images_per_prompt=settings.batch_size,
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.denoising_steps,
                guidance_scale=settings.guidance_scale,
                generator=generators,
                output_type="np",
            ).images
        for stage, start, end in marks:
            clock.add(stage, start.elapsed_time(end) if on_gpu else 1000 * (end - start))
        return images

    return make


RANDN = torch.randn


def _randn(*size: Any, dtype: torch.dtype | None = None, **named: Any) -> torch.Tensor:
    """Noise as float32 has it, whatever it is computed in: torch draws another one in bfloat16."""
    return RANDN(*size, dtype=torch.float32, **named).to(dtype)


if __name__ == "__main__":
    serve(load)
