"""What was asked: everything that determines the pixels, validated, and nothing else."""

import dataclasses
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from darkroom.contract import PRECISIONS
from darkroom.errors import InvalidRequest, near_matches
from darkroom.noise import SEED_LIMIT
from darkroom.schedule import SCHEDULERS

PIXEL_MULTIPLE = 8
"""Height and width are multiples of what one latent covers."""

FLOAT32_MOST = (2 - 2**-23) * 2.0**127
"""The largest number that networks compute with."""

OPSETS = range(17, 21)
"""ONNX opsets that graphs can be exported with: the tracing exporter ends at 20, LayerNormalization began with 17."""

TRAINED_TIMESTEPS, DISTILLED_TIMESTEPS = 1000, 50
"""What all published models were trained on, and the original steps of LCM and TCD, which make no more."""

BUILDS = ("static-batch", "dynamic-batch", "dynamic-shape")
"""What an engine leaves free: nothing; the batch; the batch, height and width."""

WHOLE = ("batch_size", "batch_count", "height", "width", "denoising_steps", "clip_skip", "seed", "onnx_opset")
KINDS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (WHOLE, int, "a whole number"),
    (("guidance_scale",), int | float, "a number"),
    (("image_strength", "refiner_strength"), int | float | None, "a number"),
    (("engine", "precision", "build"), str, "a name"),
    (("model", "scheduler", "negative_prompt", "input_image", "refiner", "vae"), str | None, "a text"),
)
"""What a recipe must hold to be replayed; flags are what they must be already."""


@dataclass(frozen=True)
class Request:
    """One run. Raises `InvalidRequest` for values that no model could be run with.

    `model` is a version's name, a hub repository, or None for a folder, which the revision identifies. `height` and
    `width` are in pixels, `scheduler` is a key of SCHEDULERS or None for the model's own, `clip_skip` counts text
    encoder layers left out. Without a `negative_prompt` guidance leads away from what the model was trained on for
    none. `input_image` is a hash of the pixels to start from, if any; `image_strength`, from 0 to 1, the share of the
    steps that are made then. `refiner` is a second model that goes on from the latents, named as `model` is with ""
    for a folder, and `refiner_strength` the share of the steps that it makes once more. `loras` are fused into the
    model. `vae` is another VAE than the model's own, named as `refiner` is.
    """

    model: str | None
    prompts: tuple[str, ...]
    negative_prompt: str | None
    batch_size: int
    batch_count: int
    height: int
    width: int
    denoising_steps: int
    guidance_scale: float
    clip_skip: int
    scheduler: str | None
    seed: int
    engine: str
    precision: str
    build: str
    onnx_opset: int
    input_image: str | None = None
    image_strength: float | None = None
    refiner: str | None = None
    refiner_strength: float | None = None
    loras: tuple["LoraChoice", ...] = ()
    vae: str | None = None

    def __post_init__(self) -> None:
        for names, kind, what in KINDS:
            for name in names:
                if not isinstance(value := getattr(self, name), kind) or isinstance(value, bool):
                    raise InvalidRequest(f"--{name.replace('_', '-')} is {what}, not {value!r}.")
        if not self.prompts:
            raise InvalidRequest("no prompt was given: say what the picture should show, in quotes.")
        for prompt in self.prompts:
            if not prompt.strip():
                raise InvalidRequest("a prompt is empty: say what the picture should show.")
        for text in (*self.prompts, self.negative_prompt or ""):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InvalidRequest(f"a prompt is not valid UTF-8 text: {text.encode('utf-8', 'backslashreplace')!r}.")
        for name in ("batch_size", "batch_count", "denoising_steps"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(self, name)}.")
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels < PIXEL_MULTIPLE or pixels % PIXEL_MULTIPLE:
                near = max(PIXEL_MULTIPLE, (pixels + PIXEL_MULTIPLE // 2) // PIXEL_MULTIPLE * PIXEL_MULTIPLE)
                raise InvalidRequest(f"--{name} must be a multiple of {PIXEL_MULTIPLE}, not {pixels}: {near} is near.")
        if not 0 <= self.guidance_scale <= FLOAT32_MOST:
            raise InvalidRequest(
                f"--guidance-scale must be a number from 0 to {FLOAT32_MOST:.2g}, not {self.guidance_scale}."
            )
        if self.clip_skip < 0:
            raise InvalidRequest(f"--clip-skip must be 0 or more, not {self.clip_skip}.")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise InvalidRequest(
                f"--scheduler {self.scheduler!r} is not known here.{near_matches(self.scheduler, list(SCHEDULERS))} "
                f"Known: {', '.join(SCHEDULERS)}."
            )
        for start, strength in ((self.input_image, self.image_strength), (self.refiner, self.refiner_strength)):
            if (start is None) != (strength is None):
                raise InvalidRequest("--image-strength says how far to leave a picture: there is none to start from.")
            if strength is None:
                continue
            if not 0 <= strength <= 1:
                raise InvalidRequest(f"--image-strength must be from 0 to 1, not {strength}.")
        if self.refiner_strength is not None:
            check_steps_left(self.denoising_steps, self.refiner_strength)
        if self.precision not in PRECISIONS:
            near = near_matches(self.precision, list(PRECISIONS))
            raise InvalidRequest(
                f"--precision {self.precision!r} is not known here.{near} Known: {', '.join(PRECISIONS)}."
            )
        if self.onnx_opset not in OPSETS:
            raise InvalidRequest(f"--onnx-opset must be from {OPSETS[0]} to {OPSETS[-1]}, not {self.onnx_opset}.")
        if self.build not in BUILDS:
            raise InvalidRequest(f"a build is one of {', '.join(BUILDS)}, not {self.build!r}.")
        if not (0 <= self.seed and self.seed + self.image_count <= SEED_LIMIT):
            raise InvalidRequest(
                f"--seed must leave every image a seed from 0 to {SEED_LIMIT - 1}; {self.seed} does not. "
                f"Without --seed a random one is drawn."
            )

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on: above a scale of 1, as in diffusers."""
        return self.guidance_scale > 1

    @property
    def skipped_steps(self) -> int | None:
        """Steps that a picture to start from makes unnecessary, as diffusers counts them where not all are made; None
        without one."""
        if self.image_strength is None:
            return None
        return self.denoising_steps - int(self.denoising_steps * self.image_strength)

    def refining(self) -> "Request":
        """What the refiner is asked: the same prompts, from the first model's latents."""
        return dataclasses.replace(
            self,
            model=self.refiner,
            clip_skip=0,
            input_image="latents",
            image_strength=self.refiner_strength,
            refiner=None,
            refiner_strength=None,
            loras=(),
        )

    @property
    def image_count(self) -> int:
        return len(self.prompts) * self.batch_size * self.batch_count

    @property
    def batch_total(self) -> int:
        """Batches of all prompts together."""
        return len(self.prompts) * self.batch_count

    def batch(self, number: int) -> "Batch":
        """One of the full batches that the images are cut into in order, prompt by prompt; counted from 0."""
        first = number * self.batch_size
        return Batch(
            first,
            (self.prompts[number // self.batch_count],) * self.batch_size,
            tuple(range(self.seed + first, self.seed + first + self.batch_size)),
        )

    def batches(self) -> Iterator["Batch"]:
        """All of them."""
        return map(self.batch, range(self.batch_total))

    def as_json(self) -> dict[str, Any]:
        lists = {"prompts": list(self.prompts), "loras": [dataclasses.asdict(lora) for lora in self.loras]}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Request":
        """The inverse of `as_json`; raises `InvalidRequest` for anything else."""
        try:
            fields = {"loras": [], "vae": None} | fields  # what older recipes have not
            if missing := {field.name for field in dataclasses.fields(cls)} - fields.keys():
                raise KeyError(min(missing))
            prompts = tuple(fields["prompts"])
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise TypeError("its prompts are not texts")
            loras = tuple(LoraChoice(**lora) for lora in fields["loras"])
            return cls(**fields | {"prompts": prompts, "loras": loras})
        except (TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"the recipe does not hold a whole request ({error}).") from None


def check_steps_left(steps: int, strength: float) -> None:
    """Raises `InvalidRequest` where a picture to start from leaves none of so many steps."""
    if not int(steps * strength):
        raise InvalidRequest(f"--image-strength {strength} of {steps} denoising steps leaves no step.")


def check_published_steps(request: "Request") -> None:
    """Raises `InvalidRequest` for more steps than any published model's scheduler makes, before a model is fetched."""
    limit = DISTILLED_TIMESTEPS if request.scheduler in ("LCM", "TCD") else TRAINED_TIMESTEPS
    if request.denoising_steps > limit:
        raise InvalidRequest(f"--denoising-steps {request.denoising_steps} is more than the {limit} that there are.")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA: the hub repository it is from, None for a file; the file's SHA-256; its weight, and the scale of all."""

    source: str | None
    sha256: str
    weight: float
    scale: float

    def __post_init__(self) -> None:
        if not isinstance(self.source, str | None) or not isinstance(self.sha256, str):
            raise InvalidRequest("a LoRA is named by texts.")
        for name in ("weight", "scale"):
            value = getattr(self, name)
            if not isinstance(value, float) or not abs(value) <= FLOAT32_MOST:
                raise InvalidRequest(f"--lora-{name} must be a number up to {FLOAT32_MOST:.2g}, not {value}.")
        if not abs(self.weight * self.scale) <= FLOAT32_MOST:
            raise InvalidRequest(
                f"--lora-weight {self.weight} times --lora-scale {self.scale} is more than {FLOAT32_MOST:.2g}."
            )


@dataclass(frozen=True)
class Batch:
    """Images that go through the engines together. `first` is the index of its first image in the run, from 0."""

    first: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def images(self) -> range:
        """The indices of its images in the run, from 0."""
        return range(self.first, self.first + len(self.seeds))


def draw_seed() -> int:
    """A seed for a run that names none: 32 bits, so that it is short enough to type again."""
    return secrets.randbits(32)
