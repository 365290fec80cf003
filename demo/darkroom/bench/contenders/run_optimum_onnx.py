"""optimum-onnx: diffusers' pipeline over ONNX Runtime."""

from protocol import Make, Settings, serve


def load(settings: Settings) -> Make:
    import torch
    from diffusers_like import contender, no_safety_checker, silence, use_scheduler
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTDiffusionPipeline

    options = SessionOptions()
    if settings.threads:
        torch.set_num_threads(settings.threads)
        options.intra_op_num_threads = settings.threads
    silence()
    pipeline = ORTDiffusionPipeline.from_pretrained(
        settings.model, provider="CPUExecutionProvider", session_options=options, **no_safety_checker(settings.model)
    )
    use_scheduler(pipeline, settings)
    return contender(pipeline, settings)


if __name__ == "__main__":
    serve(load)
