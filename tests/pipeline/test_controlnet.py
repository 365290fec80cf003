"""ControlNets against diffusers' own pipelines, and the edges that are drawn for them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from darkroom.checkpoint.original import of_controlnet
from darkroom.files import read_json
from darkroom.pipeline.edges import canny
from tests.pipeline.test_image_to_image import PROMPT, photograph
from tests.support import Diffusers, Studio, assert_refused, changed_copy, edit_json, flags, listing, louder, psnr

SAME_AS_DIFFUSERS, VISIBLE = 45, 40
"""dB."""

RUNTIMES = ("openvino", "onnxruntime", "torch", "jax")


def write_controlnet(model: Path, folder: Path, seed: int) -> Path:
    """A random ControlNet for the UNet of a model: a fresh one would answer nothing."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for name, weight in controlnet.named_parameters():
        if "controlnet_" in name and name.endswith("weight"):
            torch.nn.init.normal_(weight, std=0.3)
    louder(controlnet, 3, "controlnet_cond_embedding.conv_in.weight")
    controlnet.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def controlnets(
    tiny_model: Path, tiny_xl_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    """Two for each tiny model."""
    root = tmp_path_factory.mktemp("controlnets")
    models = {"sd": tiny_model, "xl": tiny_xl_model}
    return {
        kind: [write_controlnet(model, root / f"{kind}-{seed}", seed) for seed in (1, 2)]
        for kind, model in models.items()
    }


@pytest.fixture
def maps(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    photograph().save(paths[0])
    photograph().transpose(Image.Transpose.ROTATE_90).save(paths[1])
    return paths


class Reference:
    """Pictures of diffusers' pipelines with ControlNets."""

    def __init__(self, diffusers: Diffusers, folders: list[Path]) -> None:
        self._diffusers, self._folders = diffusers, folders

    def draw(self, count: int, pictures: list[Path], scheduler: str | None = None, **more: Any) -> np.ndarray:
        import diffusers
        import torch

        from darkroom.schedule import SCHEDULERS

        base = self._diffusers.pipeline
        kind = "XL" if hasattr(base, "text_encoder_2") else ""
        step = "Img2Img" if "image" in more else ""
        loaded = [diffusers.ControlNetModel.from_pretrained(folder) for folder in self._folders[:count]]
        given = [Image.open(picture) for picture in pictures[:count]]
        own = self._diffusers.own_scheduler  # others may have left one of theirs
        parts = {name: part for name, part in base.components.items() if part is not None} | {"scheduler": own}
        parts |= {} if kind else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        cls = getattr(diffusers, f"StableDiffusion{kind}ControlNet{step}Pipeline")
        pipeline = cls(**parts, controlnet=loaded[0] if count == 1 else loaded)
        pipeline.set_progress_bar_config(disable=True)
        if scheduler:
            name, overrides = SCHEDULERS[scheduler]
            pipeline.scheduler = getattr(diffusers, name).from_config(own.config, **overrides)
        shown = given[0] if count == 1 else given
        asked = {"guidance_scale": 7.5, "num_inference_steps": 6} | more
        asked = {"generator": [torch.Generator("cpu").manual_seed(5)]} | asked
        asked |= {"control_image": shown} if step else {"image": shown}
        made = pipeline([PROMPT], **asked)
        return np.array(made.images[0])


@pytest.fixture(params=["sd", "xl"])
def pair(request: pytest.FixtureRequest, controlnets: dict[str, list[Path]], studio: Studio, xl_studio: Studio) -> Any:
    """The script on a tiny model, its ControlNets, and diffusers with the same."""
    own = request.getfixturevalue("diffusers_tiny" if request.param == "sd" else "diffusers_tiny_xl")
    folders = controlnets[request.param]
    return studio if request.param == "sd" else xl_studio, folders, Reference(own, folders)


def draw(studio: Studio, folders: list[Path], pictures: list[Path], *more: str, **values: Any) -> np.ndarray:
    """Our picture with these ControlNets."""
    asked: dict[str, Any] = {"seed": 5, "denoising_steps": 6, "guidance_scale": 7.5, "engine": "openvino"}
    before = set(studio.output.glob("*.png"))
    ended = studio.here(
        PROMPT,
        *flags(model=studio.model, **asked | values),
        *("--controlnet", *map(str, folders), "--control-image", *map(str, pictures[: len(folders)])),
        *more,
        *studio.folders(),
    )
    assert ended.code == 0, ended.err
    (path,) = set(studio.output.glob("*.png")) - before
    return np.array(Image.open(path))


@pytest.mark.parametrize("count", [1, 2])
def test_the_picture_is_that_of_diffusers(count: int, pair: Any, maps: list[Path]) -> None:
    studio, folders, reference = pair
    made = draw(studio, folders[:count], maps, "--control-scale", *("0.6", "1.3")[:count])
    scales = [0.6, 1.3][:count]
    expected = reference.draw(count, maps, controlnet_conditioning_scale=scales if count > 1 else scales[0])
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS
    assert psnr(made, reference.draw(count, maps[::-1])) < VISIBLE


@pytest.mark.parametrize(
    ("pair", "start", "end", "scheduler", "engine"),
    [
        ("sd", 0.0, 0.5, "DDIM", "openvino"),
        ("xl", 0.34, 1.0, "EulerA", "openvino"),
        ("xl", 0.2, 0.7, "DDIM", "openvino"),
        ("sd", 0.9, 0.95, "EulerA", "openvino"),
        # These begin or end between two calls at one timestep.
        ("sd", 0.0, 0.3, "PNDM", "openvino"),
        ("sd", 0.28, 1.0, "PNDM", "jax"),
        ("xl", 0.28, 1.0, "Heun", "onnxruntime"),
    ],
    indirect=["pair"],
)
def test_it_counts_in_its_share_of_the_steps(
    start: float, end: float, scheduler: str, engine: str, pair: Any, maps: list[Path]
) -> None:
    studio, folders, reference = pair
    share = "--control-start", str(start), "--control-end", str(end)
    made = draw(studio, folders[:1], maps, *share, scheduler=scheduler, engine=engine)
    expected = reference.draw(1, maps, scheduler, control_guidance_start=start, control_guidance_end=end)
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("engine", RUNTIMES)
@pytest.mark.parametrize("pair", ["sd"], indirect=True)
def test_every_engine_makes_it(engine: str, pair: Any, maps: list[Path]) -> None:
    studio, folders, reference = pair
    made = draw(studio, folders, maps, engine=engine)
    assert psnr(made, reference.draw(2, maps)) >= SAME_AS_DIFFUSERS


def test_without_guidance_and_from_a_picture(pair: Any, maps: list[Path], tmp_path: Path) -> None:
    studio, folders, reference = pair
    made = draw(studio, folders[:1], maps, guidance_scale=1.0)
    assert psnr(made, reference.draw(1, maps, guidance_scale=1.0)) >= SAME_AS_DIFFUSERS
    from_image = replace(studio, script="demo_img2img.py")
    made = draw(from_image, folders[:1], maps, input_image=maps[1], image_strength=0.7)
    # There it would be 0.8 where nothing is passed.
    expected = reference.draw(1, maps, image=Image.open(maps[1]), strength=0.7, controlnet_conditioning_scale=1.0)
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("pair", ["xl"], indirect=True)
def test_a_refiner_goes_on_without_them(pair: Any, maps: list[Path], tiny_refiner: Path) -> None:
    import torch
    from diffusers import DiffusionPipeline

    studio, folders, reference = pair
    asked = {"enable_refiner": True, "refiner_model": tiny_refiner, "image_strength": 0.5}
    made = draw(studio, folders[:1], maps, engine="torch", **asked)
    generator = [torch.Generator("cpu").manual_seed(5)]
    latents = torch.from_numpy(reference.draw(1, maps, generator=generator, output_type="latent"))
    refiner = DiffusionPipeline.from_pretrained(tiny_refiner)
    refined = {"image": latents[None], "strength": 0.5, "guidance_scale": 7.5, "num_inference_steps": 6}
    expected = refiner([PROMPT], generator=generator, **refined).images[0]
    assert psnr(made, np.array(expected)) >= SAME_AS_DIFFUSERS


def original(folder: Path, prefix: str, file: Path) -> Path:
    """The ControlNet of a folder under the names of the original, which are those that diffusers reads."""
    from diffusers import ControlNetModel
    from safetensors.torch import load_file, save_file

    config = read_json(folder / "config.json")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({prefix + of_controlnet(name, config)[0].name: value for name, value in tensors.items()}, file)
    read = ControlNetModel.from_single_file(str(file), config=str(folder)).state_dict()
    assert read.keys() == tensors.keys() and all(value.equal(tensors[name]) for name, value in read.items())
    return file


@pytest.mark.parametrize(("pair", "prefix"), [("xl", None), ("sd", "control_model."), ("sd", "")], indirect=["pair"])
def test_a_single_file_is_read_in_either_layout(
    prefix: str | None, pair: Any, maps: list[Path], tmp_path: Path
) -> None:
    studio, folders, reference = pair
    file = tmp_path / "net.safetensors"
    if prefix is None:
        shutil.copy(folders[0] / "diffusion_pytorch_model.safetensors", file)
    else:
        original(folders[0], prefix, file)
    made = draw(studio, [file], maps, engine="torch")
    assert psnr(made, reference.draw(1, maps)) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("pair", ["sd"], indirect=True)
class TestControlNets:
    def test_a_recipe_replays(self, pair: Any, maps: list[Path], tmp_path: Path) -> None:
        studio, folders, _ = pair
        made = draw(studio, folders[:1], maps)
        (picture,) = studio.output.glob("*.png")
        rest = [
            *flags(recipe=picture, model=studio.model, output_dir=tmp_path / "again"),
            "--controlnet",
            str(folders[0]),
        ]
        where = studio.folders()[:2]
        ended = studio.here(*rest, "--control-image", str(maps[0]), *where)
        assert ended.code == 0, ended.err
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "again" / picture.name)), made)
        assert_refused(studio.here(*rest, "--control-image", str(maps[1]), *where), "second.png")
        assert_refused(studio.here(*rest, *where), "--control-image")
        other = [*rest[:-1], str(folders[1]), "--control-image", str(maps[0])]
        assert_refused(studio.here(*other, *where), "other weights")

    def test_a_model_that_has_some_already_needs_them_named(self, pair: Any, maps: list[Path], tmp_path: Path) -> None:
        studio, folders, _ = pair
        model = tmp_path / "model"
        changed_copy(studio.model, model, lambda folder: shutil.copytree(folders[0], folder / "controlnet"))
        edit_json(model / "model_index.json", controlnet=["diffusers", "ControlNetModel"])
        ended = studio.here(PROMPT, f"--model={model}", "--engine=torch", *studio.folders())
        assert_refused(ended, "1 ControlNets", "--controlnet")

    def test_edges_are_drawn_for_the_type_canny(self, pair: Any, maps: list[Path], tmp_path: Path) -> None:
        from darkroom.cli.controls import Controls
        from darkroom.request import ControlChoice

        picture = np.array(Image.open(maps[0]))
        (drawn,) = Controls(("a/b",), (picture,), (ControlChoice("a/b", "", drawn=True),)).maps(64, 64)
        np.testing.assert_array_equal(drawn, canny(picture))
        (ready,) = Controls(("a/b",), (picture,), (ControlChoice("a/b", ""),)).maps(64, 64)
        np.testing.assert_array_equal(ready, picture)

    def test_files_of_prompts_take_none(self, pair: Any, maps: list[Path], tmp_path: Path) -> None:
        studio, folders, _ = pair
        (file := tmp_path / "prompts.txt").write_text("a red apple\n")
        for more in (["--controlnet", str(folders[0])], ["--control-image", str(maps[0])], ["--control-scale", "2"]):
            ended = studio.here("--prompts", str(file), f"--model={studio.model}", *more, *studio.folders())
            assert_refused(ended, more[0])

    def test_a_dry_run_fetches_none(self, pair: Any, maps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        studio = pair[0]
        monkeypatch.setattr("darkroom.cli.dry_run.is_offline", lambda: False)
        monkeypatch.setattr("darkroom.cli.dry_run.to_fetch", lambda *_: {"config.json": 1})
        asked = ["--controlnet", "someone/net", "--control-image", str(maps[0]), "--dry-run", *studio.folders()]
        ended = studio.here(PROMPT, f"--model={studio.model}", *asked)
        assert ended.code == 0 and "someone/net/config.json" in ended.out + ended.err

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--control-image", "MAP"], "--control-image has no effect without --controlnet"),
            (["--controlnet", "NET"], "--control-image"),
            (["--controlnet", "NET", "NET", "--control-image", "MAP"], "not 1"),
            (["--controlnet", "NET", "NET", "NET", "NET", "--control-image", "MAP", "MAP", "MAP", "MAP"], "at most 3"),
            (["--controlnet", "NET", "--control-image", "missing.png"], "missing.png"),
            (["--controlnet", "missing", "--control-image", "MAP"], "missing"),
            (["--controlnet", "WRONG", "--control-image", "MAP"], "cross_attention_dim"),
            (["--controlnet", "UNET", "--control-image", "MAP"], "UNet2DConditionModel"),
            (["--controlnet", "UNET-FILE", "--control-image", "MAP"], "holds no ControlNet"),
            (["--controlnet", "MAP", "--control-image", "MAP"], "no safetensors file"),
            (["--controlnet", "BGR", "--control-image", "MAP"], "controlnet_conditioning_channel_order"),
            (
                ["--controlnet", "NET", "--control-image", "MAP", "--control-start", "0.7", "--control-end", "0.5"],
                "0.7",
            ),
            (["--controlnet", "NET", "--control-image", "MAP", "--control-scale", "1", "2"], "--control-scale"),
        ],
    )
    def test_what_cannot_be_done_is_refused(
        self,
        more: list[str],
        said: str,
        pair: Any,
        controlnets: dict[str, list[Path]],
        maps: list[Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        studio, folders, _ = pair
        monkeypatch.chdir(tmp_path)
        shutil.copytree(folders[0], tmp_path / "bgr")
        edit_json(tmp_path / "bgr" / "config.json", controlnet_conditioning_channel_order="bgr")
        words = {
            "NET": folders[0],
            "WRONG": controlnets["xl"][0],
            "MAP": maps[0],
            "UNET": studio.model / "unet",
            "UNET-FILE": studio.model / "unet" / "diffusion_pytorch_model.safetensors",
            "BGR": tmp_path / "bgr",
        }
        before = listing(studio.output)
        ended = studio.here(
            PROMPT, f"--model={studio.model}", *(str(words.get(each, each)) for each in more), *studio.folders()
        )
        assert_refused(ended, said)
        assert listing(studio.output) == before


def test_the_edges_are_those_that_opencv_draws() -> None:
    """As cv2.Canny(picture, 100, 200) of OpenCV 5.0 counts them, in this picture."""
    rows, columns = np.mgrid[0:48, 0:64]
    disc = ((rows - 24) ** 2 + (columns - 30) ** 2 < 14**2)[..., None] * np.array([200, 60, 90])
    picture = (disc + np.array([20, 90, 40])).astype(np.uint8)
    drawn = canny(picture)
    assert drawn.shape == picture.shape and set(np.unique(drawn)) == {0, 255}
    assert (drawn == drawn[..., :1]).all()
    found = np.argwhere(drawn[..., 0])
    away = np.hypot(found[:, 0] - 24, found[:, 1] - 30)
    assert len(found) == 96 and away.min() > 12.5 and away.max() < 15.5


@pytest.mark.parametrize("version", [None, "xl-1.0"])
def test_published_ones_are_named_by_their_types(version: str | None, studio: Studio, maps: list[Path]) -> None:
    ours = replace(studio, script="demo_controlnet.py")
    asked = [PROMPT, *flags(version=version, engine="openvino"), *studio.folders()]
    canny_of = [*asked, "--controlnet-type", "canny", "--input-image", str(maps[0])]
    ended = ours.here(*canny_of, "--control-end", "0.5")
    assert ended.code == 1 and "could not be fetched" in ended.err
    assert_refused(ours.here(*canny_of, "--control-scale", "0.5"), "--controlnet-scale")
    assert_refused(ours.here(*canny_of, "--controlnet-scale", "nan"), "scale", "nan")
    assert_refused(
        ours.here(*asked, "--controlnet-type", "cany", "--input-image", str(maps[0])), "--controlnet-type", "canny"
    )
    assert_refused(ours.here(*asked, "--controlnet-type", "canny"), "--input-image")
    assert_refused(ours.here(*asked), "--controlnet-type TYPE, or --controlnet")
    if version is None:  # of architectures that no published one is for
        for other in ("emoji", "2.1"):
            assert_refused(ours.here(*canny_of, "--version", other), "--controlnet-type goes with --version 1.4")
