"""Schedulers, compiled: `compile` reads a diffusers scheduler off into a table, `table` is all a run needs."""

SCHEDULERS: dict[str, tuple[str, dict]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "EulerA": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++": ("DPMSolverMultistepScheduler", {}),
    "DPM++Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "LMSD": ("LMSDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
"""What `--scheduler` takes: the diffusers class, and what it is given beyond the model's own configuration."""


SPREADABLE = "LCMScheduler"
"""The diffusers class whose steps a pipeline spreads over a share of the timesteps."""


def scheduler_class(name: str | None, model_config: dict) -> tuple[str, dict]:
    """The diffusers class and the full configuration for `--scheduler name`; the model's own without a name.

    PNDM always skips its Runge-Kutta warm-up, as every published Stable Diffusion configuration does: with it, a
    step depends on more history than a table's window holds.
    """
    own = str(model_config.get("_class_name", "PNDMScheduler"))
    class_name, overrides = SCHEDULERS[name] if name else (own, {})
    config = {key: value for key, value in model_config.items() if not key.startswith("_")} | overrides
    if class_name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    return class_name, config
