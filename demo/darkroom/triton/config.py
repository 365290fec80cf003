"""A served model's configuration: `config.pbtxt`, which people edit."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
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
        return replace(
            plan.limits,
            steps=self.max_steps,
            images=self.max_images,
            prompt_bytes=self.max_prompt_bytes,
            pixels=self.max_pixels,
        )


@dataclass(frozen=True)
class Instances:
    """How many copies of a model run, on the CPU or on each of the GPUs."""

    kind: str = "cpu"
    count: int = 1
    gpus: tuple[int, ...] = ()


def config_text(name: str, max_batch_size: int, instances: Instances, parameters: Parameters) -> str:
    """A new configuration."""
    lines = [
        f"# {name}: written by build_triton_repository.py. Change what you like, and run it again after changing",
        "# max_batch_size, height, width or max_steps: what they need is then built.",
        f'name: "{name}"',
        'backend: "python"',
        "",
        "# Images that are made together. A request with fewer does not wait for others: it joins the running batch.",
        f"max_batch_size: {max_batch_size}",
        "",
    ]
    for tensor, kind in INPUTS.items():
        lines.append(f'input {{ name: "{tensor}" data_type: {kind} dims: [ 1 ]{_left_out(tensor)} }}')
    for tensor, (kind, shape) in OUTPUTS.items():
        lines.append(f'output {{ name: "{tensor}" data_type: {kind} dims: [ {", ".join(map(str, shape))} ] }}')
    gpus = f" gpus: [ {', '.join(map(str, instances.gpus))} ]" if instances.gpus else ""
    lines += [
        "",
        f"instance_group {{ count: {instances.count} kind: KIND_{instances.kind.upper()}{gpus} }}",
        "",
        "# What a request gets that does not say, empty for the model's own; then limits that protect the server.",
    ]
    for parameter, text in parameters.texts().items():
        lines.append(f'parameters {{ key: "{parameter}" value {{ string_value: "{text}" }} }}')
    return "\n".join(lines) + "\n"


def _left_out(tensor: str) -> str:
    """What marks an input that requests may leave out."""
    return "" if tensor == "prompt" else " optional: true"


BEFORE, AFTER, ENSEMBLE = "_preprocess", "_postprocess", "_ensemble"
"""What the names of an ensemble's models add to that of the model itself."""


def ensemble_texts(name: str, max_batch_size: int, upscale: int, kind: str) -> dict[str, str]:
    """The configurations of an ensemble around a model, by the names of its models: prompts are cleaned up, pictures
    come back as files of that `kind`, `upscale` times as large."""

    def head(model: str, backend: str = 'backend: "python"') -> list[str]:
        return [f'name: "{model}"', backend, f"max_batch_size: {max_batch_size}"]

    def tensor(side: str, tensor: str, kind: str, shape: tuple[int, ...] = (1,), more: str = "") -> str:
        return f'{side} {{ name: "{tensor}" data_type: {kind} dims: [ {", ".join(map(str, shape))} ]{more} }}'

    def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
        maps = [f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
        maps += [f'output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
        return f'step {{ model_name: "{model}" model_version: -1 {" ".join(maps)} }}'

    before, after, text = name + BEFORE, name + AFTER, "TYPE_STRING"
    rest = {output: output for output in OUTPUTS if output not in ("generated_image", "recipe")}
    answers = {"encoded_image": text, "recipe": text} | {output: OUTPUTS[output][0] for output in rest}
    steps = [
        step(before, {"raw_prompt": "prompt"}, {"clean_prompt": "clean_prompt"}),
        step(
            name,
            {each: "clean_prompt" if each == "prompt" else each for each in INPUTS},
            rest | {"generated_image": "pixels", "recipe": "recipe"},
        ),
        step(after, {"pixels": "pixels", "recipes": "recipe"}, {"encoded_image": "encoded_image"}),
    ]
    files = {
        before: [*head(before), tensor("input", "raw_prompt", text), tensor("output", "clean_prompt", text)],
        after: [
            *head(after),
            tensor("input", "pixels", *OUTPUTS["generated_image"]),
            tensor("input", "recipes", text),
            tensor("output", "encoded_image", text),
            f'parameters {{ key: "upscale" value {{ string_value: "{upscale}" }} }}',
            f'parameters {{ key: "format" value {{ string_value: "{kind}" }} }}',
        ],
        name + ENSEMBLE: [
            *head(name + ENSEMBLE, 'platform: "ensemble"'),
            *(
                tensor("input", each, INPUTS[each], more="" if each == "prompt" else " optional: true")
                for each in INPUTS
            ),
            *(tensor("output", each, kind) for each, kind in answers.items()),
            f"ensemble_scheduling {{ {' '.join(steps)} }}",
        ],
    }
    return {model: "\n".join(lines) + "\n" for model, lines in files.items()}


def read_config(file: Path) -> Any:
    """The configuration in a file, as Triton's own message `ModelConfig`. Raises `InvalidRequest` where it is none."""
    from google.protobuf import text_format

    message = _message()
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), message)
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


def _message() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise InvalidRequest('reading config.pbtxt needs a package: pip install "tritonclient[grpc]"') from None
    return model_config_pb2.ModelConfig()
