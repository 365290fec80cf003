"""Pictures made of others, over both APIs: each is the one that the script makes alone."""

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.pipeline.test_image_to_image import photograph
from tests.pipeline.test_inpainting import ellipse
from tests.support import Studio, psnr
from tests.web.conftest import Server
from tests.web.test_openai import SAME, opened

FIELDS: dict[str, Any] = {"seed": 5, "steps": 6, "guidance_scale": 3.0}
ALONE: dict[str, Any] = {"seed": 5, "denoising_steps": 6, "guidance_scale": 3.0}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def text(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def clear_where(mask: Image.Image) -> Image.Image:
    """As OpenAI has masks: transparent where it is painted anew."""
    made = Image.new("RGBA", mask.size, "black")
    made.putalpha(Image.fromarray(255 - np.array(mask)))
    return made


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    photograph().save(tmp_path / "picture.png")
    ellipse().save(tmp_path / "mask.png")
    return tmp_path / "picture.png", tmp_path / "mask.png"


def from_image(studio: Studio, script: str) -> Studio:
    return Studio(studio.root, studio.model, script=script)


def test_edits_are_the_pictures_of_the_scripts(server: Server, studio: Studio, files: tuple[Path, Path]) -> None:
    picture, mask = files
    client = server.client()
    more = {"prompt": "a red apple", "extra_body": FIELDS | {"image_strength": 0.7}}
    answer = client.images.edit(image=("a.png", png(photograph())), n=2, **more)
    for image, datum in enumerate(answer.data):
        alone = from_image(studio, "demo_img2img.py").draw(
            "a red apple", **ALONE | {"seed": 5 + image}, input_image=picture, image_strength=0.7
        )
        assert psnr(np.array(opened(datum.b64_json)), alone.pictures[0]) >= SAME
    more["extra_body"] = FIELDS
    masked = ("m.png", png(clear_where(ellipse())))
    (datum,) = client.images.edit(image=("a.png", png(photograph())), mask=masked, **more).data
    inpainting = from_image(studio, "demo_inpaint.py")
    alone = inpainting.draw("a red apple", **ALONE, input_image=picture, mask_image=mask)
    made = opened(datum.b64_json)
    assert psnr(np.array(made), alone.pictures[0]) >= SAME
    anew = np.array(ellipse()) == 255
    np.testing.assert_array_equal(np.array(made)[~anew], np.array(photograph())[~anew])


def test_an_edit_replays_by_its_recipe(
    server: Server, studio: Studio, files: tuple[Path, Path], tmp_path: Path
) -> None:
    picture, mask = files
    masked = ("m.png", png(clear_where(ellipse())))
    (datum,) = (
        server.client()
        .images.edit(image=("a.png", png(photograph())), mask=masked, prompt="a dog", extra_body=FIELDS)
        .data
    )
    (tmp_path / "made.png").write_bytes(base64.b64decode(datum.b64_json))
    again = from_image(studio, "demo_inpaint.py").draw(
        recipe=tmp_path / "made.png", input_image=picture, mask_image=mask, output_dir=tmp_path / "again"
    )
    assert psnr(again.pictures[0], np.array(opened(datum.b64_json))) >= SAME


def test_an_edit_can_be_watched(server: Server) -> None:
    events = list(
        server.client().images.edit(
            image=("a.png", png(photograph())), prompt="a dog", stream=True, partial_images=2, extra_body=FIELDS
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


@pytest.mark.parametrize("masked", [False, True])
def test_webui_makes_the_pictures_of_the_scripts(
    masked: bool, server: Server, studio: Studio, files: tuple[Path, Path]
) -> None:
    picture, mask = files
    body: dict[str, Any] = {"prompt": "a dog", "seed": 5, "steps": 6, "cfg_scale": 3.0, "denoising_strength": 0.6}
    body["init_images"] = [f"data:image/png;base64,{text(photograph())}"]
    given: dict[str, Any] = {"input_image": picture, "image_strength": 0.6}
    if masked:
        body["mask"] = text(ellipse())
        given |= {"mask_image": mask, "mask_blur": 4.0}
    answer = httpx.post(f"{server.url}/sdapi/v1/img2img", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    alone = from_image(studio, "demo_inpaint.py" if masked else "demo_img2img.py").draw("a dog", **ALONE, **given)
    assert psnr(np.array(opened(answer.json()["images"][0])), alone.pictures[0]) >= SAME


@pytest.mark.parametrize(
    ("files", "fields", "status", "said"),
    [
        ({}, {"prompt": "a"}, 400, "image is missing"),
        ({"image": b"no picture"}, {"prompt": "a"}, 400, "image is no PNG"),
        ({"image": png(photograph())}, {}, 400, "prompt is missing"),
        ({"image": png(photograph()), "mask": png(ellipse())}, {"prompt": "a"}, 400, "no transparency"),
        ({"image": png(photograph()), "picture": b""}, {"prompt": "a"}, 400, "'picture' is not a file"),
        ({"image": png(photograph())}, {"prompt": "a", "image_strength": "7"}, 400, "image_strength"),
        ({"image": png(photograph())}, {"prompt": "a", "steps": "many"}, 400, "steps must be a number"),
        ({"image": png(Image.new("1", (8192, 4096)))}, {"prompt": "a"}, 413, "too many"),
    ],
)
def test_wrong_edits_are_refused(
    files: dict[str, bytes], fields: dict[str, str], status: int, said: str, server: Server
) -> None:
    sent = {name: (f"{name}.png", data) for name, data in files.items()} or {"mask": ("mask.png", png(ellipse()))}
    answer = httpx.post(f"{server.url}/v1/images/edits", files=sent, data=fields, timeout=600)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "init_images"),
        ({"init_images": ["%%"]}, "not base64"),
        ({"init_images": [text(photograph())] * 2}, "init_images"),
        ({"init_images": [text(photograph())], "mask": text(ellipse()), "mask_blur": -1}, "mask-blur"),
        ({"init_images": [text(photograph())], "denoising_strength": "much"}, "denoising_strength"),
        ({"init_images": [text(photograph())], "resize_mode": 2}, "resize_mode"),
    ],
)
def test_wrong_requests_of_webui_are_refused(fields: dict[str, Any], said: str, server: Server) -> None:
    answer = httpx.post(f"{server.url}/sdapi/v1/img2img", json={"prompt": "a dog"} | fields, timeout=600)
    assert answer.status_code in (400, 422) and said in answer.json()["detail"], answer.text


def test_official_client_gets_its_own_errors(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="image is no PNG"):
        server.client().images.edit(image=("a.png", b"nothing"), prompt="a dog")
