"""diffusers in PyTorch, eager or compiled as its documentation says ("Accelerate inference")."""

from protocol import Make, Settings, serve


def load(settings: Settings) -> Make:
    import torch
    from diffusers import DiffusionPipeline
    from diffusers_like import contender, no_safety_checker, silence, use_scheduler

    if settings.threads:
        torch.set_num_threads(settings.threads)
    silence()
    # PyTorch's own precision is float32, and files in float16 are no reason to leave it on a CPU.
    pipeline = DiffusionPipeline.from_pretrained(
        settings.model, torch_dtype=torch.float32, **no_safety_checker(settings.model)
    )
    use_scheduler(pipeline, settings)
    # Documented as faster, and measured here: up to a sixth of the UNet's time.
    if settings.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if settings.compile:
        # Happens in the first batch. The loop over the steps and the scheduler stay Python, as everywhere.
        pipeline.unet.forward = torch.compile(pipeline.unet.forward, fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True)
    return contender(pipeline, settings)


if __name__ == "__main__":
    serve(load)
