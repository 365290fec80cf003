"""Schedulers, compiled: `compile` reads a diffusers scheduler off into a table, `table` is all a run needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

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
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "TCD": ("TCDScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
"""What `--scheduler` takes: the diffusers class, and what it is given beyond the model's own configuration. PNDM always
skips its Runge-Kutta warm-up, as every published Stable Diffusion configuration does: with it, a step depends on more
history than a table's window holds."""


SPREADABLE = "LCMScheduler"
"""The diffusers class whose steps a pipeline spreads over a share of the timesteps."""


@dataclass(frozen=True)
class Chosen:
    """A scheduler as diffusers comes to it: the model's own is made from its file, and one that is asked for from that.

    `config`: what the model's scheduler_config.json says. `own`: the class of the model's own scheduler where one was
    asked for, which has `overrides` beyond the own one's configuration. `corrected`: whether the model's pipeline puts
    right what old configurations say.
    """

    class_name: str
    config: dict[str, Any]
    own: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    corrected: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def chosen(name: str | None, own: str, config: dict[str, Any], corrected: bool = False) -> Chosen:
    """What `--scheduler name` means for a model whose own scheduler is of the class `own`; that one without a name."""
    if name is None:
        return Chosen(own, config, corrected=corrected)
    class_name, overrides = SCHEDULERS[name]
    return Chosen(class_name, config, own, overrides, corrected)
