"""What a stage is: named inputs and outputs whose shapes are written in the sizes that a user knows."""

from dataclasses import dataclass, field
from pathlib import Path

PRECISIONS = ("fp32", "bf16", "fp16")
AUTO = "auto"
"""In the place of a precision: what is measured to be the fastest of those that agree with float32."""


PLACES = ("provider", "device")
"""The options that say where a runtime runs networks; recipes and manifests hold them."""

FREE = -1
"""A size that an engine leaves open."""

DRAWS = "N"
DRAWS_BOUNDS = (1, 20, 1000)
"""The symbol of how many noises a schedule draws, and its bounds: at least one is there, drawn or not."""


@dataclass(frozen=True)
class Tensor:
    """`shape` mixes numbers and the symbols of `Profile.sizes`: "B", latent "h" and "w", pixel "H" and "W", and "T" for
    the tokens of a prompt that may take several chunks. `count` is how many values an integer tensor takes, from 0 up;
    None where that is not known."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    count: int | None = None


GUIDANCE_SCALE = Tensor("guidance_scale", ("B",))
TEXT, DENOISER, DECODER, ENCODER = "text", "denoiser", "decoder", "encoder"
"""What a stage does: reads prompts, makes a step, turns latents into pictures, pictures into latents."""

MASK, MASKED = "mask", "masked_latents"
"""What a denoiser that was trained to inpaint is given beside latents: (B, 1, h, w), 1 where the picture is painted
anew, and (B, C, h, w), those of the picture without what is there."""

CONTROLS = ("control", "control_2", "control_3")
CONTROL_SCALES, CONTROL_FROM, CONTROL_UNTIL = "control_scales", "control_from", "control_until"
"""What ControlNets are given: a map (B, 3, H, W) in [0, 1] each; and of all of them (B, K) what their answers are
multiplied by, and the timesteps from the first to the last at which they count."""

COMMON = (MASK, MASKED, *CONTROLS, CONTROL_SCALES, CONTROL_FROM, CONTROL_UNTIL)
"""The inputs of a denoiser, beside latents and timestep, that are the same for what guidance leads away from."""

NEGATIVE = "negative_"
"""What begins the names of a denoiser's inputs that guidance leads away from."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file, the networks that it changes, its own weight, and the scale of all of them."""

    path: Path
    sha256: str
    networks: frozenset[str]
    weight: float = 1.0
    scale: float = 1.0

    @property
    def strength(self) -> float:
        """What its changes are multiplied by."""
        return self.weight * self.scale


@dataclass(frozen=True)
class Inversion:
    """A textual inversion: its file, the `word` that prompts call it by, its tensor for each text encoder, by the
    names of parts, and the number of vectors in each."""

    path: Path
    sha256: str
    word: str
    tensors: dict[str, str]
    vectors: int


@dataclass(frozen=True)
class Network:
    """A part of a model's folder, and its class as "library:Class"."""

    part: str
    cls: str


@dataclass(frozen=True)
class Stage:
    """One graph as the pipeline meets it: a network, or several that are computed together.

    `module` names what makes the torch module of the stage and its networks, as "package.module:factory"; `role` is one
    of TEXT, DENOISER, DECODER and ENCODER. `options` are choices that change its graph; `steady` names the inputs that
    stay the same for all steps of a picture, which a runtime may use. `loras` are fused into the networks' weights, a
    text encoder knows `inversions`, and `half_weights` tells whether those are kept in float16, at float32 precision
    too; `large`, whether a copy of them is worth avoiding.

    A denoiser takes latents (B, C, h, w) and timestep (B,) first, and gives output (B, C, h, w).
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    networks: tuple[Network, ...] = ()
    module: str = ""
    role: str = ""
    options: dict[str, int | float | bool] = field(default_factory=dict)
    steady: tuple[str, ...] = ()
    loras: tuple[Lora, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    half_weights: bool = False
    large: bool = False

    @property
    def denoises(self) -> bool:
        """Whether it is called at every step."""
        return self.role == DENOISER

    @property
    def latents(self) -> Tensor:
        """The denoiser's input that changes from step to step."""
        return next(tensor for tensor in self.inputs if tensor.name == "latents")

    @property
    def takes_chunks(self) -> bool:
        """Whether a prompt may have several chunks."""
        return any("T" in tensor.shape for tensor in self.inputs)

    @property
    def spatial(self) -> bool:
        """Whether any shape depends on the picture's size."""
        return any(size in ("h", "w", "H", "W") for tensor in self.inputs for size in tensor.shape)


@dataclass(frozen=True)
class Profile:
    """The sizes an engine is built for: images a batch, height and width in pixels; None leaves one free. The denoiser
    takes so many `chunks` of a prompt, each of as many tokens as text encoders read at a time: `context`.

    `batches` and `pixels` bound what is free, where a runtime needs bounds: the least, the one to be best at, the most.
    """

    batch: int | None
    height: int | None
    width: int | None
    vae_factor: int = 8
    batches: tuple[int, int, int] = (1, 1, 8)
    pixels: tuple[int, int, int] = (512, 512, 768)
    context: int = 77
    chunks: int = 1

    def sizes(self) -> dict[str, int]:
        """A number for every symbol of a shape; `FREE` where the profile leaves it open."""
        sizes = {"B": self.batch, "H": self.height, "W": self.width, "T": self.chunks * self.context}
        for latent, pixel in (("h", self.height), ("w", self.width)):
            sizes[latent] = None if pixel is None else pixel // self.vae_factor
        return {symbol: FREE if size is None else size for symbol, size in sizes.items()}

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The tensor's shape under this profile, `FREE` in the open places."""
        sizes = self.sizes()
        return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)

    def bounds(self, tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The tensor's least, best and largest shape under this profile."""
        height, width = (3 * (size,) if size else self.pixels for size in (self.height, self.width))
        sizes = {"B": 3 * (self.batch,) if self.batch else self.batches, "H": height, "W": width}
        sizes |= {DRAWS: DRAWS_BOUNDS, "T": 3 * (self.chunks * self.context,)}
        sizes |= {latent: tuple(size // self.vae_factor for size in sizes[latent.upper()]) for latent in "hw"}
        least, best, most = (
            tuple(sizes[size][which] if isinstance(size, str) else size for size in tensor.shape) for which in range(3)
        )
        return least, best, most

    def label(self, spatial: bool = True) -> str:
        """`b1-128x128`, or `b1` for a stage that knows no height and width; a free size is written `any`. Tokens
        stand behind them where there are several chunks of a prompt."""
        batch, height, width = ("any" if size is None else str(size) for size in (self.batch, self.height, self.width))
        sizes = f"b{batch}-{height}x{width}" if spatial else f"b{batch}"
        return sizes if self.chunks == 1 else f"{sizes}-{self.chunks * self.context}"


def precision_of(asked: str, stage: str) -> str:
    """A stage's precision, where `asked` is one for all, or as "unet=bf16,clip=fp32" those of some: others have
    float32."""
    return asked if "=" not in asked else precisions_by_stage(asked).get(stage, PRECISIONS[0])


def precisions_by_stage(asked: str) -> dict[str, str]:
    """Those that name a stage: empty for one precision for all."""
    return {stage: own for stage, equals, own in (each.partition("=") for each in asked.split(",")) if equals}


def spelled(precisions: dict[str, str]) -> str:
    """The inverse: the precisions of stages by their names, as one word where they are the same."""
    if len(set(precisions.values())) == 1:
        return next(iter(precisions.values()))
    return ",".join(f"{stage}={own}" for stage, own in sorted(precisions.items()))


@dataclass(frozen=True)
class Job:
    """One engine: the stage, the sizes it is for, and the precision it computes in."""

    stage: Stage
    profile: Profile
    precision: str
