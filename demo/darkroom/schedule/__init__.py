"""Schedulers, compiled: `compile` reads a diffusers scheduler off into a table, `table` is all a run needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from darkroom.errors import InvalidRequest

SCHEDULERS: dict[str, tuple[str, dict]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "EulerA": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++": ("DPMSolverMultistepScheduler", {}),
    "DPM++2MSDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++SDE": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2A": ("KDPM2AncestralDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "LMSD": ("LMSDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "TCD": ("TCDScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}),
}
"""What `--scheduler` takes: the diffusers class, and what it is given beyond the model's own configuration. PNDM always
skips its Runge-Kutta warm-up, as every published Stable Diffusion configuration does: with it, a step depends on more
history than a table's window holds. DPM++SDE is the solver that diffusers' documentation names for it, at second order;
its DPMSolverSDEScheduler draws from a tree of Brownian motion that belongs to no image's seed."""

SIGMA_SWITCHES = {f"use_{kind}_sigmas": kind for kind in ("karras", "exponential", "beta")}
"""What makes a scheduler of diffusers space its steps by another rule, and that rule's name."""

SIGMAS: dict[str, dict[str, Any]] = {
    **{kind: {switch: kind == named for switch, named in SIGMA_SWITCHES.items()} for kind in SIGMA_SWITCHES.values()},
    "sgm_uniform": {switch: False for switch in SIGMA_SWITCHES} | {"timestep_spacing": "trailing"},
}
"""What `--sigmas` takes, by the names that other tools have for them, and what the scheduler is then given."""


SPREADABLE = "LCMScheduler"
"""The diffusers class whose steps a pipeline spreads over a share of the timesteps."""


KEPT, GIVEN = "kept", "given"
"""What a schedule makes of a mask: it blends what the mask leaves into every sample, or leaves that to the network."""


LINEAR_SIGMAS = "linear"
"""What `Chosen.sigmas` may be: from 1 to 1 / steps, which some pipelines of flow matching give their scheduler."""


@dataclass(frozen=True)
class Chosen:
    """A scheduler as diffusers comes to it: the model's own is made from its file, and a requested one from that.

    `config`: what the model's scheduler_config.json says. `own`: the class of the model's own scheduler where one was
    requested, which has `overrides` beyond the own one's configuration. `corrected`: whether the model's pipeline puts
    right what old configurations say. `mu` and `sigmas` are what the pipeline gives it beside the number of steps:
    how far the picture's size shifts them (see `shift_mu`), by `mu_per_step` more for each of the steps, and
    LINEAR_SIGMAS or None.
    """

    class_name: str
    config: dict[str, Any]
    own: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    corrected: bool = False
    mu: float | None = None
    sigmas: str | None = None
    mu_per_step: float | None = None

    def as_json(self) -> dict[str, Any]:
        """What is not given is not there, as in the keys of schedules from before it was known."""
        left_out = {name for name in ("mu", "sigmas", "mu_per_step") if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def chosen(
    name: str | None,
    own: str,
    config: dict[str, Any],
    corrected: bool = False,
    sigmas: str | None = None,
    shift: float | None = None,
) -> Chosen:
    """What `--scheduler name --sigmas sigmas --shift shift` means for a model whose own scheduler is of the class
    `own`; that one without a name, its own spacing without sigmas, and its own shift, which may depend on the picture's
    size, without one.

    Raises `InvalidRequest` for a scheduler of flow matching where the model's is none, and the other way round; and for
    a shift where it is none.
    """
    spacing = SIGMAS[sigmas] if sigmas else {}
    if shift is not None:
        config = config | _shifted(shift, own, config)
    if name is None:
        return Chosen(own, config, own if sigmas else None, spacing, corrected)
    if name not in (fitting := schedulers_for(own, config)):
        raise InvalidRequest(
            f"--scheduler {name} does not fit this model, which was trained for the steps of "
            f"{own.removesuffix('Scheduler')}: take one of {', '.join(fitting)}."
        )
    class_name, overrides = SCHEDULERS[name]
    return Chosen(class_name, config, own, overrides | spacing, corrected)


def schedulers_for(own: str, config: dict[str, Any]) -> list[str]:
    """The names of SCHEDULERS that fit a model whose own scheduler is of the class `own`."""
    flow = _is_flow(own, config)
    return [name for name, (class_name, _) in SCHEDULERS.items() if class_name.startswith("FlowMatch") == flow]


def _is_flow(own: str, config: dict[str, Any]) -> bool:
    return own.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))


def _shifted(shift: float, own: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says instead, where its steps are shifted so far towards the noise at every size."""
    if not _is_flow(own, config):
        raise InvalidRequest(f"--shift has no effect with {own.removesuffix('Scheduler')}: it is for flow matching.")
    if not shift:
        raise InvalidRequest("--shift 0 would leave no noise to begin with: 1 leaves the steps where they are.")
    name = "shift" if own.startswith("FlowMatch") else "flow_shift"
    return {name: shift, "use_dynamic_shifting": False}


def shift_mu(config: dict[str, Any], image_tokens: int) -> float | None:
    """How far the steps for a picture of so many tokens are shifted towards its noise; None where the configuration of
    the model's scheduler says that its size does not matter.

    As `calculate_shift` of diffusers' Flux and Stable Diffusion 3 pipelines has it: a line through (256 tokens, 0.5)
    and (4096 tokens, 1.15), or what the configuration has in their place.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (most - least)
    return image_tokens * slope + (base - slope * least)
