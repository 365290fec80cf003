"""The models of an ensemble that stand before and after the one that makes pictures."""

import json
import unicodedata
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # what the backend offers its models

from darkroom.pipeline.pictures import encoded, upscaled


class Preprocess:
    """Prompts as people type and paste them -> prompts without what is invisible: `raw_prompt` -> `clean_prompt`."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [_answered(self._clean, request) for request in requests]

    def _clean(self, request: Any) -> dict[str, np.ndarray]:
        prompts = pb_utils.get_input_tensor_by_name(request, "raw_prompt").as_numpy()
        cleaned = [clean(bytes(prompt).decode("utf-8")).encode() for prompt in prompts.reshape(-1)]
        return {"clean_prompt": np.array(cleaned, np.object_).reshape(prompts.shape)}


class Postprocess:
    """Pictures -> files: `pixels` (N, H, W, 3) and their `recipes` -> `encoded_image`, a whole PNG or JPEG each."""

    def initialize(self, args: dict[str, str]) -> None:
        given = json.loads(args["model_config"])["parameters"]
        self._upscale = int(given["upscale"]["string_value"])
        self._format = given["format"]["string_value"]
        if self._upscale < 1 or self._format not in ("png", "jpeg"):
            raise pb_utils.TritonModelException("upscale is a whole number from 1, format is png or jpeg")

    def execute(self, requests: list[Any]) -> list[Any]:
        return [_answered(self._encode, request) for request in requests]

    def _encode(self, request: Any) -> dict[str, np.ndarray]:
        pictures = pb_utils.get_input_tensor_by_name(request, "pixels").as_numpy()
        recipes = pb_utils.get_input_tensor_by_name(request, "recipes").as_numpy().reshape(-1)
        files = [
            [encoded(upscaled(picture, self._upscale), self._format, json.loads(recipe))]
            for picture, recipe in zip(pictures, recipes, strict=True)
        ]
        return {"encoded_image": np.array(files, np.object_)}


def clean(prompt: str) -> str:
    """One line, composed as keyboards compose it, without control characters and formatting marks."""
    plain = unicodedata.normalize("NFC", prompt)
    seen = (" " if character.isspace() else character for character in plain)
    return " ".join("".join(each for each in seen if unicodedata.category(each)[0] != "C").split())


def _answered(work: Any, request: Any) -> Any:
    try:
        tensors = [pb_utils.Tensor(name, value) for name, value in work(request).items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
    except Exception as error:  # of this request alone
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
