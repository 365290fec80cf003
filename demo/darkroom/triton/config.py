"""A served model's configuration: `config.pbtxt`, which people edit."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import Template
from typing import Any

from darkroom.errors import InvalidRequest, near_matches
from darkroom.flags import OF_ROW
from darkroom.request import Request
from darkroom.serving.service import Limits, Plan

CONFIG = "config.pbtxt"
INPUTS = {name: f"TYPE_{flag.tensor_type}" for name, flag in OF_ROW.items()}
"""What a request may hold of each prompt; all but the prompt itself can be left out."""

OUTPUTS = {
    "generated_image": ("TYPE_UINT8", (-1, -1, -1)),
    "used_seed": ("TYPE_UINT64", (1,)),
    "recipe": ("TYPE_STRING", (1,)),
    "stage_times": ("TYPE_STRING", (1,)),
}
"""Of each image: its pixels [H, W, 3], its seed, its recipe in JSON, and milliseconds by stage in JSON."""

QUEUE = 64


@dataclass(frozen=True)
class Parameters:
    """The `parameters` of a configuration: defaults of requests, and limits that protect the server. None leaves it to
    the model, or was not said; without a `seed` every image that names none gets a random one."""

    version: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    max_steps: int = Limits.steps
    max_images: int = Limits.images
    max_prompt_bytes: int = Limits.prompt_bytes
    max_pixels: int = Limits.pixels
    queue: int = QUEUE
    threads: int | None = None

    @classmethod
    def read(cls, given: dict[str, str]) -> "Parameters":
        """From texts, an empty one meaning None. Raises `InvalidRequest` for names and values that are none."""
        kinds = {"version": str, "scheduler": str, "guidance_scale": float}
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for name, text in given.items():
            if name.isupper():  # Triton's own, as EXECUTION_ENV_PATH
                continue
            if name not in known:
                raise InvalidRequest(
                    f"{name!r} is not a parameter of {CONFIG}.{near_matches(name, known)} Known: {', '.join(known)}."
                )
            if not text:
                continue
            kind = kinds.get(name, int)
            try:
                values[name] = kind(text)
            except ValueError:
                what = "a number" if kind is float else "a whole number"
                raise InvalidRequest(f"the parameter {name} of {CONFIG} must be {what}, not {text!r}.") from None
            least = 0 if name == "seed" else 1
            if kind is int and values[name] < least:
                raise InvalidRequest(f"the parameter {name} of {CONFIG} must be {least} or more, not {text}.")
        return cls(**values)

    def texts(self) -> dict[str, str]:
        """As `parameters` have them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: "" if value is None else str(value) for name, value in values.items()}

    def request(self, plan: Plan) -> Request:
        """A plan's default request as these parameters change it."""
        own = {name: getattr(self, name) for name in ("guidance_scale", "scheduler", "height", "width")}
        own["denoising_steps"] = self.steps
        return replace(plan.request, **{name: value for name, value in own.items() if value is not None})

    def limits(self, plan: Plan) -> Limits:
        """A plan's limits as these parameters change them."""
        limited = ("steps", "images", "prompt_bytes", "pixels")
        return replace(plan.limits, **{name: getattr(self, f"max_{name}") for name in limited})


@dataclass(frozen=True)
class Instances:
    """How many copies of a model run, on the CPU or on each of the GPUs."""

    kind: str = "cpu"
    count: int = 1
    gpus: tuple[int, ...] = ()


def config_text(name: str, max_batch_size: int, instances: Instances, parameters: Parameters) -> str:
    """A new configuration."""
    outputs = (_tensor("output", tensor, kind, shape) for tensor, (kind, shape) in OUTPUTS.items())
    return _filled(
        "model",
        name=name,
        slots=max_batch_size,
        inputs=_inputs(),
        outputs="\n".join(outputs),
        count=instances.count,
        kind=instances.kind.upper(),
        gpus=f" gpus: [ {', '.join(map(str, instances.gpus))} ]" if instances.gpus else "",
        parameters="\n".join(
            f'parameters {{ key: "{parameter}" value {{ string_value: "{text}" }} }}'
            for parameter, text in parameters.texts().items()
        ),
    )


BEFORE, AFTER, ENSEMBLE = "_preprocess", "_postprocess", "_ensemble"
"""What the names of an ensemble's models add to that of the model itself."""


def ensemble_texts(name: str, max_batch_size: int, upscale: int, kind: str) -> dict[str, str]:
    """The configurations of an ensemble around a model, by the names of its models: prompts are cleaned up, pictures
    come back as files of that `kind`, `upscale` times as large."""
    passed_on = (f'input_map {{ key: "{each}" value: "{each}" }}' for each in INPUTS if each != "prompt")
    values = {"name": name, "slots": max_batch_size, "upscale": upscale, "format": kind, "inputs": _inputs()}
    values["passed_on"] = "\n    ".join(passed_on)
    return {name + model: _filled(model.removeprefix("_"), **values) for model in (BEFORE, AFTER, ENSEMBLE)}


def _filled(template: str, **values: Any) -> str:
    """One of the templates beside this file."""
    return Template(Path(__file__).with_name(f"{template}.pbtxt").read_text(encoding="utf-8")).substitute(values)


def _inputs() -> str:
    """All but the prompt can be left out."""
    left_out = {name: "" if name == "prompt" else " optional: true" for name in INPUTS}
    return "\n".join(_tensor("input", name, kind, (1,), left_out[name]) for name, kind in INPUTS.items())


def _tensor(side: str, name: str, kind: str, shape: tuple[int, ...], more: str = "") -> str:
    return f'{side} {{ name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, shape))} ]{more} }}'


def read_config(file: Path) -> Any:
    """The configuration in a file, as Triton's own message `ModelConfig`. Raises `InvalidRequest` where it is none."""
    from google.protobuf import text_format

    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        raise InvalidRequest('reading config.pbtxt needs a package: pip install "tritonclient[grpc]"') from None
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), ModelConfig())
    except (text_format.ParseError, ValueError) as error:
        raise InvalidRequest(f"{file} is not a model's configuration: {' '.join(str(error).split())}.") from None
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}.") from None


def changed_text(config: Any, max_batch_size: int | None, instances: Instances | None, changes: dict[str, str]) -> str:
    """A configuration with these changes, and all else as it was."""
    from google.protobuf import text_format

    if max_batch_size is not None:
        config.max_batch_size = max_batch_size
    if instances is not None:
        del config.instance_group[:]
        group = config.instance_group.add(count=instances.count, gpus=instances.gpus)
        group.kind = group.Kind.Value(f"KIND_{instances.kind.upper()}")
    for name, text in changes.items():
        config.parameters[name].string_value = text
    return text_format.MessageToString(config)
