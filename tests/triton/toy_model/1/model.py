"""A toy with the interface of Darkroom's Triton model: noise from the seed, and a few prompts that misbehave.

`fail` fails its request, `busy` says that there is no room for it, `hurry` what time it has, `slow` takes all of that,
unless it is cancelled or the file `awake` lies beside its configuration, `unreadable` answers a recipe that is none.
A copy whose configuration has the output `encoded_image` answers PNG files instead of pixels.
"""

import json
import os
import random
import struct
import time
import zlib

import numpy as np
import triton_python_backend_utils as pb_utils

FIELDS = ("negative_prompt", "seed", "steps", "guidance_scale", "scheduler", "height", "width", "num_images")
SECONDS = 0.02
SLOW_SECONDS = 600.0
AWAKE = "awake"


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.awake = os.path.join(args["model_repository"], AWAKE)
        self.encodes = "encoded_image" in [output["name"] for output in config["output"]]

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        began = time.perf_counter()
        prompts = _texts(request, "prompt")
        if "fail" in prompts:
            return _failed("the toy was asked to fail")
        if "busy" in prompts:
            return _failed("the toy has no room", pb_utils.TritonError.UNAVAILABLE)
        seconds = request.timeout() / 1e6 or SLOW_SECONDS
        if "hurry" in prompts:
            return _failed(f"the toy has {seconds:g} seconds")
        if "slow" in prompts:
            print("toy: slow has begun", flush=True)
            while time.perf_counter() - began < seconds and not os.path.exists(self.awake):
                if request.is_cancelled():
                    print("toy: a request was cancelled", flush=True)
                    break
                time.sleep(0.01)
            print("toy: slow has ended", flush=True)
            return _failed("the toy was slow", pb_utils.TritonError.CANCELLED)
        time.sleep(SECONDS)
        rows = [self._row(request, row) for row in range(len(prompts))]
        images = [
            {"prompt": prompt, "image": image + 1, "seed": fields["seed"] + image, "slot": image, "request": fields}
            for prompt, fields in zip(prompts, rows, strict=True)
            for image in range(fields["num_images"])
        ]
        took = 1000 * (time.perf_counter() - began)
        times = {"Queue": 0.5, "CLIP": 1.0, "UNet": took, "VAE-Dec": 2.0, "Pipeline": took + 3.0}
        pixels = np.stack([_noise(image) for image in images])
        tensors = {
            "used_seed": np.array([[image["seed"]] for image in images], np.uint64),
            "stage_times": _column([json.dumps(times)] * len(images)),
        }
        if self.encodes:
            tensors["encoded_image"] = np.array([[_png(picture)] for picture in pixels], np.object_)
        else:
            tensors["generated_image"] = pixels
            tensors["recipe"] = _column([_recipe(image) for image in images])
        asked = request.requested_output_names()
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, tensors[name]) for name in asked])

    def _row(self, request, row):
        fields = {"seed": random.getrandbits(32), "num_images": 1, "height": 16, "width": 16, "steps": 3}
        fields |= {"guidance_scale": 7.5, "scheduler": None, "negative_prompt": None}
        for name in FIELDS:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                value = tensor.as_numpy()[row, 0]
                fields[name] = value.decode() if isinstance(value, bytes) else value.item()
        return fields


def _texts(request, name):
    return [text.decode() for text in pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0]]


def _column(texts):
    return np.array([[text.encode()] for text in texts], np.object_)


def _failed(message, *code):
    return pb_utils.InferenceResponse([], error=pb_utils.TritonError(message, *code))


def _noise(image):
    asked = image["request"]
    generator = np.random.Generator(np.random.PCG64(image["seed"]))
    return generator.integers(0, 256, (asked["height"], asked["width"], 3), np.uint8)


def _recipe(image):
    """As the scripts' own; what is unknown to a toy is made up."""
    if image["prompt"] == "unreadable":
        return "no recipe"
    asked = image["request"]
    request = {
        "model": "toy",
        "prompts": [image["prompt"]],
        "negative_prompt": asked["negative_prompt"],
        "batch_size": asked["num_images"],
        "batch_count": 1,
        "height": asked["height"],
        "width": asked["width"],
        "denoising_steps": asked["steps"],
        "guidance_scale": asked["guidance_scale"],
        "clip_skip": 0,
        "scheduler": asked["scheduler"],
        "seed": asked["seed"],
        "engine": "toy",
        "precision": "fp32",
        "build": "static-batch",
        "onnx_opset": 17,
        "loras": [],
    }
    made_by = {"darkroom": "0", "revision": "0" * 64, "scheduler": "toy", "runtime": "toy 0", "artefacts": {}}
    return json.dumps(made_by | {key: image[key] for key in ("prompt", "image", "seed", "slot")} | {"request": request})


def _png(pixels):
    """(H, W, 3) uint8 -> a PNG file. https://www.w3.org/TR/png/"""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )
