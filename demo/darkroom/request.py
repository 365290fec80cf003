"""A request: everything that determines the pixels, validated, and nothing else."""

import dataclasses
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from darkroom.contract import precisions_by_stage, spelled
from darkroom.errors import InvalidRequest
from darkroom.flags import FLOAT32_MOST, OF_REQUEST, PIXEL_MULTIPLE, option, wrong_text
from darkroom.noise import SEED_LIMIT
from darkroom.values import from_json, to_json

TRAINED_TIMESTEPS, DISTILLED_TIMESTEPS = 1000, 50
"""What all published models were trained on, and the original steps of LCM and TCD, which make no more."""


LARGEST_BLUR = 1000
"""Pixels: more is a slip of the hand."""

OF_REFINER = "refiner."
"""What begins the names of a refiner's stages, where they have precisions of their own."""

DENOISED_BY = "denoised_by"
"""Where a recipe names the engines that made the steps of a picture that shared its batch with others'. The next time,
others may make the same picture."""

DEFAULTS = {name: flag.default for name, flag in OF_REQUEST.items()}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run. Raises `InvalidRequest` for values that no model could be run with.

    `model` is a version's name, a hub repository, or None for a folder, which the revision identifies. `height` and
    `width` are in pixels, `scheduler` is a key of SCHEDULERS and `sigmas` one of SIGMAS, None for the model's own, as
    are the `shift` of flow matching and `max_sequence_length`, the tokens of a prompt that text encoders for long ones
    read. `clip_skip` counts text encoder layers left out. Without a `negative_prompt` guidance leads away from what the
    model was trained on for none; the second text encoder, where a model has one, reads `prompt_2` and
    `negative_prompt_2` in their place. `prompt_syntax` is one of SYNTAXES. `input_image` is a hash of the pixels to
    start from, if any; `image_strength`, from 0 to 1, the share of the steps that are made then. `refiner` is a second
    model that goes on from the latents, named as `model` is with "" for a folder, and `refiner_strength` the share of
    the steps that it makes once more. `loras` are fused into the model, and `embeddings` are words that it learns.
    `drawn` are the prompts of the images, in order, where each drew its own. The finished pictures are enlarged
    `upscale` times. `vae` is another VAE than the model's own, named as `refiner` is. `mask` is what of the picture to
    start from is painted anew; None for all of it. `controls` are the model's ControlNets, in their order.
    """

    model: str | None
    prompts: tuple[str, ...]
    negative_prompt: str | None = None
    batch_size: int = DEFAULTS["batch_size"]
    batch_count: int = DEFAULTS["batch_count"]
    height: int
    width: int
    denoising_steps: int
    guidance_scale: float
    clip_skip: int = DEFAULTS["clip_skip"]
    scheduler: str | None = None
    sigmas: str | None = None
    shift: float | None = None
    max_sequence_length: int | None = None
    seed: int = 0
    engine: str = DEFAULTS["engine"]
    precision: str = DEFAULTS["precision"]
    build: str = DEFAULTS["build"]
    onnx_opset: int = DEFAULTS["onnx_opset"]
    input_image: str | None = None
    image_strength: float | None = None
    refiner: str | None = None
    refiner_strength: float | None = None
    loras: tuple["LoraChoice", ...] = ()
    vae: str | None = None
    embeddings: tuple["EmbeddingChoice", ...] = ()
    drawn: tuple[str, ...] = ()
    upscale: float = DEFAULTS["upscale"]
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    prompt_syntax: str = DEFAULTS["prompt_syntax"]
    mask: "MaskChoice | None" = None
    controls: tuple["ControlChoice", ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            flag, value = OF_REQUEST.get(field.name), getattr(self, field.name)
            if flag is None or (value is None and field.name in LEFT_OUT):
                continue
            if wrong := flag.wrong(value):
                raise InvalidRequest(f"{option(flag.name)} {wrong}")
        if not self.prompts:
            raise InvalidRequest("no prompt was given: say what the picture should show, in quotes.")
        if self.prompt_2 is not None and not self.prompt_2.strip():
            raise InvalidRequest("--prompt-2 is empty: leave it out where both text encoders read the same.")
        for prompt in (*self.prompts, *self.drawn):
            if not prompt.strip():
                raise InvalidRequest("a prompt is empty: say what the picture should show.")
            if wrong := wrong_text(prompt):
                raise InvalidRequest(f"a prompt {wrong}")
        for start, strength in ((self.input_image, self.image_strength), (self.refiner, self.refiner_strength)):
            if (start is None) != (strength is None):
                raise InvalidRequest("--image-strength says how far to leave a picture: there is none to start from.")
        if self.refiner_strength is not None:
            left = int(self.denoising_steps * self.refiner_strength)
            check_steps_left(self.denoising_steps, self.refiner_strength, left)
        if len(self.drawn) not in (0, self.image_count):
            raise InvalidRequest(f"{len(self.drawn)} prompts were drawn for {self.image_count} images.")
        if self.seed + self.image_count > SEED_LIMIT:
            raise InvalidRequest(
                f"--seed must leave every image a seed from 0 to {SEED_LIMIT - 1}; {self.seed} does not. "
                f"Without --seed a random one is drawn."
            )

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on: above a scale of 1, as in diffusers."""
        return self.guidance_scale > 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts that its images are made from, each once."""
        return tuple(dict.fromkeys(self.drawn or self.prompts))

    @property
    def negative_prompts(self) -> dict[str, str]:
        """What guidance is to lead away from, by the names of fields, where it is more than an empty text."""
        return {name: text for name in ("negative_prompt", "negative_prompt_2") if (text := getattr(self, name))}

    def refining(self) -> "Request":
        """The request to the refiner: the prompts of the first text encoder, from the first model's latents."""
        return dataclasses.replace(
            self,
            model=self.refiner,
            clip_skip=0,
            prompt_2=None,
            negative_prompt_2=None,
            input_image="latents",
            image_strength=self.refiner_strength,
            refiner=None,
            refiner_strength=None,
            loras=(),
            mask=None,
            controls=(),
            precision=self._refiners_precision(),
        )

    def _refiners_precision(self) -> str:
        own = {
            stage.removeprefix(OF_REFINER): precision
            for stage, precision in precisions_by_stage(self.precision).items()
            if stage.startswith(OF_REFINER)
        }
        return spelled(own) if own else self.precision

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
            self.drawn[first : first + self.batch_size]
            or (self.prompts[number // self.batch_count],) * self.batch_size,
            tuple(range(self.seed + first, self.seed + first + self.batch_size)),
        )

    def batches(self) -> Iterator["Batch"]:
        """All of them."""
        return map(self.batch, range(self.batch_total))

    def as_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Request":
        """The inverse of `as_json`; raises `InvalidRequest` for anything else."""
        try:
            usual = {each.name: to_json(each.default) for each in dataclasses.fields(cls) if each.name in NEWER}
            fields = usual | fields
            if missing := {field.name for field in dataclasses.fields(cls)} - fields.keys():
                raise KeyError(min(missing))
            if not all(isinstance(prompt, str) for prompt in fields["prompts"]):
                raise TypeError("its prompts are not texts")
            return from_json(cls, fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"the recipe does not hold a whole request ({error}).") from None


def check_steps_left(steps: int, strength: float, left: int) -> None:
    """Raises `InvalidRequest` where a picture to start from leaves none of so many steps."""
    if not left:
        raise InvalidRequest(f"--image-strength {strength} of {steps} denoising steps leaves no step.")


def check_published_steps(request: "Request") -> None:
    """Raises `InvalidRequest` for more steps than any published model's scheduler makes, before a model is fetched."""
    limit = DISTILLED_TIMESTEPS if request.scheduler in ("LCM", "TCD") else TRAINED_TIMESTEPS
    if request.denoising_steps > limit:
        raise InvalidRequest(f"--denoising-steps {request.denoising_steps} is more than the {limit} that there are.")


NEWER = (
    "loras",
    "embeddings",
    "drawn",
    "vae",
    "sigmas",
    "shift",
    "max_sequence_length",
    "upscale",
    "prompt_2",
    "negative_prompt_2",
    "prompt_syntax",
    "mask",
    "controls",
)
"""The fields that older recipes lack."""

LEFT_OUT = {each.name for each in dataclasses.fields(Request) if type(None) in get_args(each.type)}
"""The fields that may be None."""


@dataclass(frozen=True)
class MaskChoice:
    """A mask: the SHA-256 of its pixels, and what it came of: the blur of its edge, and what was added to the picture
    at its left, top, right and bottom, all in pixels. `keep` tells whether what it leaves keeps its bytes."""

    sha256: str
    blur: float = 0.0
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    keep: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.blur, int | float) and 0 <= self.blur <= LARGEST_BLUR):
            raise InvalidRequest(f"--mask-blur must be a number from 0 to {LARGEST_BLUR}, not {self.blur}.")
        added = self.outpaint
        if len(added) != 4 or any(type(each) is not int or each < 0 or each % PIXEL_MULTIPLE for each in added):
            raise InvalidRequest(
                f"--outpaint takes multiples of {PIXEL_MULTIPLE} pixels, not {' '.join(map(str, added))}."
            )


@dataclass(frozen=True)
class ControlChoice:
    """A ControlNet: the hub repository it is from, None for a folder; the SHA-256 of its map's pixels; what its answers
    are multiplied by; and the shares of the calls at which it begins and ends to count. `drawn` tells whether the map
    was drawn from a picture, as its edges."""

    source: str | None
    sha256: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    drawn: bool = False

    def __post_init__(self) -> None:
        if not abs(self.scale) <= FLOAT32_MOST:
            raise InvalidRequest(f"a ControlNet's scale must be a number up to {FLOAT32_MOST:.2g}, not {self.scale}.")
        if not 0 <= self.start < self.end <= 1:
            raise InvalidRequest(
                f"--control-start {self.start} and --control-end {self.end} are shares of the steps, from 0 to 1, and "
                f"the first is less."
            )


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
class EmbeddingChoice:
    """A textual inversion: its file's SHA-256, and the word that prompts call it by."""

    sha256: str
    word: str


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


def pixels_digest(pixels: Any) -> str:
    """SHA-256 of an array of uint8 and its shape, in hex."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def draw_seed() -> int:
    """A seed for a run that names none: 32 bits, so that it is short enough to type again."""
    return secrets.randbits(32)
