"""What a model of one kind is: its parts, stages, sizes and conditions. A subclass of `Family` says it, one file each.

A family reads a model's index and configurations; it opens no weights and imports no torch. How its networks are
computed, a stage names as `module:factory` (`contract.Stage.module`), which the processes that compile import.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from darkroom.contract import DECODER, ENCODER, GUIDANCE_SCALE, NEGATIVE, TEXT, Network, Stage, Tensor
from darkroom.errors import InvalidRequest
from darkroom.flags import PIXEL_MULTIPLE, option
from darkroom.request import Request
from darkroom.schedule import Chosen

LEAST_CONTEXT = 3
"""Tokens of a prompt's beginning, of one word, and of its end."""

TINY_VAE = "AutoencoderTiny"
"""TAESD's kind (https://github.com/madebyollin/taesd): it encodes to latents, not to a distribution of them."""


@dataclass(frozen=True)
class Part:
    """A network in a model's folder.

    `cls` is its class as "library:Class", and `defaults` are what that takes for the keys that are read here, where a
    configuration leaves them out. `stem` begins the names of its weight files. `tokenizer` is the folder of the ids
    that a text encoder reads. `lora` begins the names of the tensors that LoRA files hold for it, in whatever layout.
    `original` has what begins its tensors' names in a file in the original layout, and which of `checkpoint.original`'s
    layouts they are in. `inversion` is what files of textual inversions call the vectors for it. Without one that is
    `optional` a model makes pictures too: where its index names none, and where its folder is not there. A `chat` model
    is given a prompt in its tokenizer's template, as its user's words."""

    cls: str
    defaults: dict[str, Any] = field(default_factory=dict)
    stem: str = "diffusion_pytorch_model"
    tokenizer: str | None = None
    lora: tuple[str, ...] = ()
    original: tuple[tuple[str, str], ...] = ()
    inversion: str = ""
    optional: bool = False
    chat: bool = False


class Model(Protocol):
    """What a family reads of a model: its index, and the configurations of its parts with their defaults."""

    index: dict[str, Any]
    digests: dict[str, str]
    text_length: int | None

    def config(self, part: str) -> dict[str, Any]: ...

    def padded(self, part: str) -> int | None:
        """The length that a text encoder's tokenizer pads prompts to; None where its configuration does not say."""
        ...


@dataclass(frozen=True)
class Traits:
    """What of a model a run has to know beside its engines. A process that has these, the artefacts and nothing else
    of the model makes the same pictures.

    `texts` are the stages of its text encoders, in the order of their tokenizers. `vae_factor`: pixels per latent,
    along each side. `embeds_guidance`: the denoiser is called once, and given the guidance scale.
    `zeros_for_empty_prompt`: it was trained with zeros, not an empty prompt's embeddings, for guidance to lead away
    from. `inpaints`: the denoiser is given a mask and what it leaves of a picture. `controls` counts the ControlNets
    that it is computed with. `rows` name text encoders and denoiser in the timing table. `facts` are what only the
    family itself reads.
    """

    family: str
    texts: tuple[str, ...]
    latent_channels: int
    vae_factor: int
    embeds_guidance: bool = False
    zeros_for_empty_prompt: bool = False
    inpaints: bool = False
    controls: int = 0
    rows: tuple[str, str] = ("CLIP", "UNet")
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self, request: Request) -> None:
        """Raises `InvalidRequest` for texts that this model has no use for, and where ControlNets lack maps."""
        for name in request.negative_prompts if self.embeds_guidance else ():
            raise InvalidRequest(
                f"{option(name)} has no effect: this model is called once, with the guidance scale as an input."
            )
        for name in ("prompt_2", "negative_prompt_2") if len(self.texts) < 2 else ():
            if getattr(request, name) is not None:
                raise InvalidRequest(f"{option(name)} has no effect: this model has one text encoder.")
        if len(request.controls) != self.controls:
            raise InvalidRequest(
                f"this model is computed with {self.controls} ControlNets, and there are maps for "
                f"{len(request.controls)}: name them all with --controlnet."
            )

    def guided(self, request: Request) -> bool:
        """Whether the request takes a denoiser with classifier-free guidance in its graph."""
        return request.guided and not self.embeds_guidance


class Family:
    """One kind of model. `register` (in `darkroom.families`) makes an instance known by the classes in `pipelines`.

    `name` stands in scripts, plans and recipes; `title` is what people call it. `parts` are its networks, in the order
    of their digests; `switches` are the entries of a model index that change pictures. `denoiser` and `vae` are those
    of its parts that make steps and pictures; the denoiser's stage has that name too. `text_stages` are those of its
    text encoders, and `controlnets` the parts that a model's folder may have for ControlNets, in their order. Heights
    and widths are multiples of `multiple` pixels.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    parts: ClassVar[dict[str, Part]]
    switches: tuple[str, ...] = ()
    denoiser: str
    vae: str = "vae"
    controlnets: tuple[str, ...] = ()
    multiple: int = PIXEL_MULTIPLE
    text_stages: ClassVar[dict[str, str]] = {}

    def parts_of(self, index: dict[str, Any]) -> dict[str, Part]:
        """The networks of the model that an index describes."""
        there = {name for name in self.parts if (index.get(name) or [None])[0]}
        return {name: part for name, part in self.parts.items() if not part.optional or name in there}

    def tokenizers_of(self, index: dict[str, Any]) -> list[str]:
        """The folders of its tokenizers."""
        return [part.tokenizer for part in self.parts_of(index).values() if part.tokenizer]

    def check(self, model: Model) -> None:
        """Raises ValueError, in half a sentence, for a configuration that pictures would come out wrong with."""

    def corrects(self, model: Model) -> bool:
        """Whether its pipeline puts right what old configurations of a scheduler say."""
        return False

    def scheduler(self, model: Model, choice: Chosen, height: int, width: int) -> Chosen:
        """The scheduler as its pipeline sets it for a picture of this size: see `Chosen.mu` and `Chosen.sigmas`."""
        return choice

    def spreads_steps(self, model: Model) -> bool:
        """Whether all steps are made from a picture too, over the timesteps that its strength leaves. The others leave
        steps out."""
        return False

    def steps_left(self, steps: int, strength: float) -> int:
        """How many steps are made from a picture, where not all are: pipelines round a part of a step down, or up."""
        return int(steps * strength)

    def vae_factor(self, model: Model) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(model.config(self.vae)["block_out_channels"]) - 1)

    def most_pixels(self, model: Model) -> int | None:
        """The largest height and width; None where there is no largest."""
        return None

    def free_multiple(self, model: Model) -> int:
        """A graph with free sizes takes multiples of this many pixels."""
        raise NotImplementedError

    def default_sizes(self, model: Model) -> tuple[int, int]:
        """Height and width in pixels that the denoiser was trained for."""
        raise NotImplementedError

    def context(self, model: Model, part: str) -> int:
        """How many tokens a text encoder reads of a prompt: what its tokenizer pads to, or less if it has less room."""
        room = model.config(part).get("max_position_embeddings")
        known = [length for length in (room, model.padded(part)) if length is not None]
        if not known:
            raise ValueError(f"the tokenizer of the {part} does not say how many tokens a prompt has")
        return min(known)

    def longest_text(self, model: Model) -> int:
        """The most tokens that --max-sequence-length takes, which `Model.text_length` is; 0 where it has no effect."""
        return 0

    def layers_to_skip(self, model: Model) -> int:
        """How many layers of the text encoders --clip-skip can leave out."""
        return 0

    def precision(self, model: Model, stage: Stage, asked: str) -> str:
        """What a stage is computed in where `asked` is what the request says."""
        return asked

    def stages(self, model: Model, guided: bool, clip_skip: int) -> dict[str, Stage]:
        """The contracts of all stages by their names: text encoders, one denoiser, the decoder, and the encoder that
        starts from a picture. `clip_skip` counts text encoder layers left out at the end, as in diffusers. Where that
        is for the prompt alone, the stage NAME_negative reads negative prompts.
        """
        raise NotImplementedError

    def traits(self, model: Model) -> Traits:
        """What a run has to know of the model."""
        raise NotImplementedError

    def conditions(self, traits: Traits, request: Request, negative: bool = False) -> dict[str, np.ndarray]:
        """What the denoiser is given of an image beside latents, timestep and text: () or (N,) each. `negative` is what
        guidance leads away from in its place."""
        if traits.embeds_guidance:
            return {GUIDANCE_SCALE.name: np.array(request.guidance_scale, np.float32)}
        return {}

    def text_stage(
        self,
        model: Model,
        part: str,
        outputs: tuple[Tensor, ...],
        options: dict[str, Any],
        guided: bool,
        module: str = "darkroom.networks.clip:encoder",
    ) -> dict[str, Stage]:
        """The contract of a text encoder; and with guidance of one that leaves out no layers, where layers are left
        out, because diffusers does that for the prompt alone."""
        ids = Tensor("input_ids", ("B", self.context(model, part)), "int32", model.config(part)["vocab_size"])
        name = self.text_stages[part]

        def stage(options: dict[str, Any]) -> Stage:
            return Stage(name, (ids,), outputs, (self.network(part),), module, TEXT, options)

        made = {name: stage(options)}
        if guided and options.get("clip_skip"):
            made[f"{name}_negative"] = stage(options | {"clip_skip": 0})
        return made

    def vae_stages(self, model: Model) -> dict[str, Stage]:
        """The contracts of the autoencoder's two halves: latents (B, C, h, w), as the denoiser has them -> images
        (B, 3, H, W) in [-1, 1], and back to mean and deviation (B, C, h, w), or to a mean alone."""
        latents = Tensor("latents", ("B", model.config(self.vae)["latent_channels"], "h", "w"))
        images = Tensor("images", ("B", 3, "H", "W"))
        kind = model.config(self.vae).get("_class_name") or "AutoencoderKL"
        moments = ("mean",) if kind == TINY_VAE else ("mean", "deviation")
        moments = tuple(Tensor(name, latents.shape) for name in moments)
        networks, module = (Network(self.vae, f"diffusers:{kind}"),), "darkroom.networks.vae:{}"
        decoder = Stage(self.vae, (latents,), (images,), networks, module.format("decoder"), DECODER)
        encoder = Stage(f"{self.vae}_encoder", (images,), moments, networks, module.format("encoder"), ENCODER)
        return {stage.name: stage for stage in (decoder, encoder)}

    def network(self, part: str) -> Network:
        """A part as a stage names it."""
        return Network(part, self.parts[part].cls)

    def texts(self, model: Model) -> list[str]:
        """The text encoders of a model, in the order in which prompts are read."""
        return [part for part in self.parts_of(model.index) if self.parts[part].tokenizer]


def denoiser_inputs(
    latents: Tensor,
    conditions: tuple[Tensor, ...],
    guided: bool,
    embeds_guidance: bool,
    common: tuple[Tensor, ...] = (),
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The inputs of a denoiser, and which of them stay the same for all steps: latents (B, C, h, w), timestep (B,),
    those of `COMMON` that it has, the conditions; with guidance in the graph also the same with the prefix negative_;
    and with either kind of guidance guidance_scale (B,)."""
    steady = conditions
    if embeds_guidance:
        steady += (GUIDANCE_SCALE,)
    elif guided:
        steady += (*(Tensor(NEGATIVE + each.name, each.shape) for each in conditions), GUIDANCE_SCALE)
    steady = common + steady
    return (latents, Tensor("timestep", ("B",)), *steady), tuple(tensor.name for tensor in steady)
