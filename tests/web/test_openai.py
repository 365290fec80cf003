"""OpenAI's images API, spoken by OpenAI's own client."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.support import Studio, psnr, until
from tests.web.conftest import Server

SAME = 50
"""dB, of a picture and the one that the script makes alone."""

FIELDS = {"seed": 5, "steps": 3}


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_models_say_what_may_be_asked_of_them(server: Server, tiny_model: Path) -> None:
    (model,) = server.client().models.list()
    assert model.id == tiny_model.name
    assert model.defaults["height"] == 64 and model.schedulers == ["Euler", "EulerA"]
    assert server.client().models.retrieve(model.id) == model


def test_pictures_are_those_of_the_script(server: Server, studio: Studio) -> None:
    answer = server.client().images.generate(prompt="a red apple", n=3, extra_body=FIELDS)
    assert (answer.size, answer.output_format, len(answer.data)) == ("64x64", "png", 3)
    for image, datum in enumerate(answer.data):
        alone = studio.draw("a red apple", seed=5 + image).pictures[0]
        assert psnr(np.array(opened(datum.b64_json)), alone) >= SAME
        assert datum.seed == 5 + image


def test_every_field_acts(server: Server, studio: Studio) -> None:
    more = {"negative_prompt": "blue", "guidance_scale": 3.0, "scheduler": "EulerA", "steps": 4, "seed": 8}
    (datum,) = server.client().images.generate(prompt="a dog", size="64x64", extra_body=more).data
    asked = {"negative_prompt": "blue", "guidance_scale": 3.0, "scheduler": "EulerA", "denoising_steps": 4, "seed": 8}
    alone = studio.draw("a dog", **asked).pictures[0]
    assert psnr(np.array(opened(datum.b64_json)), alone) >= SAME


@pytest.mark.parametrize(("kind", "of_pillow"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_pictures_come_in_the_format_that_is_asked_for(server: Server, kind: str, of_pillow: str) -> None:
    answer = server.client().images.generate(prompt="a dog", output_format=kind, extra_body=FIELDS)
    assert opened(answer.data[0].b64_json).format == of_pillow


def test_url_leads_to_the_picture_and_its_recipe(server: Server) -> None:
    import httpx

    (datum,) = server.client().images.generate(prompt="a dog", response_format="url", extra_body=FIELDS).data
    picture = Image.open(io.BytesIO(httpx.get(datum.url).content))
    assert picture.size == (64, 64) and '"seed": 5' in picture.text["darkroom"]


def test_stream_shows_each_picture_as_it_comes_up(server: Server) -> None:
    """Later previews are nearer to the picture."""
    events = list(
        server.client().images.generate(
            prompt="a dog", n=2, stream=True, partial_images=3, extra_body=FIELDS | {"steps": 20}
        )
    )
    for image in range(2):
        own = [event for event in events if event.image_index == image]
        assert [event.type for event in own] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
        assert [event.partial_image_index for event in own[:-1]] == [0, 1, 2]
        pictures = [np.array(opened(event.b64_json).convert("RGB")) for event in own]
        small = np.array(Image.fromarray(pictures[-1]).resize((8, 8), Image.Resampling.BOX).resize((64, 64)))
        near = [psnr(picture, small) for picture in pictures[:-1]]
        assert near[0] < near[2]


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no prompt": ({"prompt": ""}, 400, "prompt"),
    "long prompt": ({"prompt": "a" * 3000}, 400, "prompt"),
    "model": ({"model": "dall-e-3"}, 404, "model"),
    "size": ({"size": "1024x1024"}, 400, "height"),
    "size in words": ({"size": "large"}, 400, "size"),
    "many": ({"n": 100}, 400, "n"),
    "none": ({"n": 0}, 400, "n"),
    "quality": ({"quality": "hd"}, 400, "quality"),
    "style": ({"style": "vivid"}, 400, "style"),
    "background": ({"background": "transparent"}, 400, "background"),
    "compression of png": ({"output_compression": 50}, 400, "output_compression"),
    "previews without stream": ({"partial_images": 2}, 400, "partial_images"),
    "url of a stream": ({"response_format": "url", "stream": True}, 400, "response_format"),
    "steps": ({"extra_body": {"steps": 51}}, 400, "steps"),
    "kind of steps": ({"extra_body": {"steps": "many"}}, 400, "steps"),
    "scheduler": ({"extra_body": {"scheduler": "Eular"}}, 400, "scheduler"),
    "scheduler that is not there": ({"extra_body": {"scheduler": "DDIM"}}, 400, None),
    "seed": ({"extra_body": {"seed": -1}}, 400, "seed"),
    "field": ({"extra_body": {"strength": 1}}, 400, "strength"),
    "both sizes": ({"size": "64x64", "extra_body": {"height": 64}}, 400, "size"),
    "no guidance": ({"extra_body": {"negative_prompt": "x", "guidance_scale": 1}}, 400, "negative_prompt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_refused_by_the_field(server: Server, name: str) -> None:
    asked, status, field = REFUSED[name]
    with pytest.raises(openai.APIStatusError) as refused:
        server.client().images.generate(**{"prompt": "a dog"} | asked)
    assert (refused.value.status_code, refused.value.param) == (status, field)
    assert refused.value.type in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_slots(server: Server, stream: bool) -> None:
    import httpx

    def counted(name: str) -> float:
        text = httpx.get(f"{server.url}/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith(f"darkroom_{name}{{")]
        return float(line.split()[-1])

    before = counted("steps_total")
    body = {"prompt": "a dog", "n": 8, "steps": 50, "stream": stream}
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body) if stream else httpx.Client() as opened:
        if not stream:
            with pytest.raises(httpx.TimeoutException):
                opened.post(f"{server.url}/v1/images/generations", json=body, timeout=0.05)
    until(lambda: counted("slots_occupied") + counted("queue_images") == 0)
    assert counted("steps_total") - before < 8 * 50
