"""AUTOMATIC1111's web API."""

import base64
import io
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import Studio, psnr, until
from tests.web.conftest import Server


def call(server: Server, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    url = f"{server.url}/sdapi/v1/{path}"
    return httpx.get(url) if body is None else httpx.post(url, json=body, timeout=60)


def test_pictures_are_those_of_the_script(server: Server, studio: Studio) -> None:
    """A request as such clients send it, with what they never use."""
    asked = {"prompt": "a dog", "negative_prompt": "blue", "steps": 3, "cfg_scale": 7.5, "seed": 5, "batch_size": 2}
    asked |= {"sampler_name": "Euler a", "scheduler": "Automatic", "width": 64, "height": 64, "restore_faces": False}
    asked |= {"tiling": False, "enable_hr": False, "denoising_strength": 0.7, "styles": [], "subseed": -1, "eta": None}
    answer = call(server, "txt2img", asked).json()
    assert json.loads(answer["info"])["all_seeds"] == [5, 6]
    for image, data in enumerate(answer["images"]):
        made = Image.open(io.BytesIO(base64.b64decode(data)))
        alone = studio.draw("a dog", negative_prompt="blue", seed=5 + image, scheduler="EulerA").pictures[0]
        assert psnr(np.array(made), alone) >= 50
        assert "Steps: 3" in made.text["parameters"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"restore_faces": True}, "restore_faces"),
        ({"styles": ["anime"]}, "styles"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"alwayson_scripts": {"x": 1}}, "alwayson_scripts"),
        ({"sampler_name": "DPM fast"}, "sampler_name"),
        ({"scheduler": "Polyexponential", "sampler_name": "Euler"}, "Polyexponential"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 1000}, "steps"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "other"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "CLIP_stop_at_last_layers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server: Server, more: dict[str, Any], said: str) -> None:
    answer = call(server, "txt2img", {"prompt": "a dog", "steps": 2} | more)
    assert answer.status_code in (400, 404, 422)
    assert said in answer.json()["detail"] and {"error", "detail", "body", "errors"} == answer.json().keys()


def test_progress_goes_up_and_interrupt_ends_it(server: Server) -> None:
    answers: list[httpx.Response] = []
    asked = {"prompt": "a dog", "steps": 50, "n_iter": 8}
    waiting = threading.Thread(target=lambda: answers.append(call(server, "txt2img", asked)))
    waiting.start()
    until(lambda: call(server, "progress").json()["progress"] > 0)
    state = call(server, "progress").json()
    assert state["state"]["sampling_steps"] == 8 * 51 or state["progress"] == 0  # PNDM makes a call more than steps
    call(server, "interrupt", {})
    waiting.join()
    assert answers[0].status_code in (503, 200)
    assert call(server, "progress").json()["progress"] == 0


def test_models_and_samplers_are_listed(server: Server) -> None:
    (model,) = call(server, "sd-models").json()
    assert call(server, "options").json()["sd_model_checkpoint"] == model["title"]
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= {each["name"] for each in call(server, "samplers").json()}
