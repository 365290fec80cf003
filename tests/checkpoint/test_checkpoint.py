"""A model folder is complete and readable, or refused by the name of the file that is not."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from darkroom.checkpoint.folder import Checkpoint, open_checkpoint
from darkroom.errors import InvalidRequest
from darkroom.store.fingerprints import Fingerprints
from darkroom.text.compile import compile_tokenizer
from darkroom.text.tokenizer import Tokenizer
from tests.support import edit_json

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
CONFIGS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, Fingerprints(folder.parent / ".fingerprints.json"), ("sd",))


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidRequest) as refused:
        opened(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_whole_folder_is_opened(model: Path) -> None:
    checkpoint = opened(model)
    assert checkpoint.vae_factor == 8
    assert checkpoint.default_size == 64
    assert set(checkpoint.digests) == set(WEIGHTS)


@pytest.mark.parametrize("size", [8, 64, 96])
@pytest.mark.parametrize("version", ["0.6.0", "0.8.1", "0.8.0.dev0", "0.9.0.dev0", "0.9.0", "0.10.2", "1.0", None])
def test_default_size_is_the_one_that_diffusers_takes(version: str | None, size: int, model: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    path = model / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"sample_size": size, "_diffusers_version": version}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path.parent))
    pipeline = StableDiffusionPipeline(None, None, None, unet, None, None, None, None, False)
    assert opened(model).default_size == pipeline.unet.config.sample_size * 8
    edit_json(model / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    assert opened(model).default_size == size * 8  # which does not


def test_height_and_width_may_differ(model: Path) -> None:
    edit_json(model / "unet" / "config.json", sample_size=[8, 12])
    assert opened(model).default_sizes == (64, 96)


def test_prompts_are_as_long_as_the_tokenizer_makes_them(model: Path) -> None:
    from transformers import CLIPTokenizer

    assert opened(model).context("text_encoder") == 77
    edit_json(model / "tokenizer" / "tokenizer_config.json", model_max_length=20)
    checkpoint, reference = opened(model), CLIPTokenizer.from_pretrained(model / "tokenizer")
    expected = reference("a red bird", padding="max_length", max_length=reference.model_max_length).input_ids
    ours = Tokenizer(compile_tokenizer(*checkpoint.tokenizer_source("text_encoder"))[1])
    assert ours.encode(["a red bird"]).ids[0].tolist() == expected
    for unlimited in (int(1e30), None):  # as transformers writes it, and as it reads it
        edit_json(model / "tokenizer" / "tokenizer_config.json", model_max_length=unlimited)
        assert opened(model).context("text_encoder") == 77


@pytest.mark.parametrize("length", [2, 0, -1, "77", True, float("nan")])
def test_prompts_without_room_are_refused(length: Any, model: Path) -> None:
    edit_json(config := model / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert str(config) in (said := refusal(model)) and "model_max_length" in said


@pytest.mark.parametrize("masked", [True, False])
def test_attention_mask_of_the_text_is_refused_by_name(masked: bool, model: Path) -> None:
    """StableDiffusionPipeline would hide the padding from such an encoder."""
    edit_json(model / "text_encoder" / "config.json", use_attention_mask=masked)
    if masked:
        assert "use_attention_mask" in refusal(model)
    else:
        opened(model)


def test_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [*CONFIGS, *WEIGHTS.values()])
def test_missing_file_is_named(name: str, model: Path) -> None:
    (model / name).unlink()
    assert str(model / name) in refusal(model)


@pytest.mark.parametrize("name", [*CONFIGS, *WEIGHTS.values()])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -2])
def test_truncated_file_is_named(name: str, keep: float, model: Path) -> None:
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: int(len(content) * keep)] if isinstance(keep, float) else content[:keep])
    assert str(model / name) in refusal(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("content", [b"[]", b"null", b'"text"', b"\xff\xfe\x00"])
def test_configuration_that_is_no_object_is_named(name: str, content: bytes, model: Path) -> None:
    (model / name).write_bytes(content)
    assert str(model / name) in refusal(model)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("vae", {"block_out_channels": 5}),
        ("vae", {"block_out_channels": []}),
        ("vae", {"scaling_factor": "0.2"}),
        ("vae", {"scaling_factor": float("nan")}),
        ("unet", {"sample_size": "abc"}),
        ("unet", {"sample_size": []}),
        ("unet", {"sample_size": [8]}),
        ("unet", {"in_channels": None}),
        ("text_encoder", {"num_hidden_layers": "three"}),
        ("text_encoder", {"hidden_size": -1}),
        ("text_encoder", {"num_attention_heads": 0}),
        ("text_encoder", {"vocab_size": "many"}),
    ],
    ids=str,
)
def test_value_of_another_kind_is_named_with_its_file(part: str, wrong: dict[str, object], model: Path) -> None:
    edit_json(model / part / "config.json", **wrong)
    said = refusal(model)
    assert str(model / part / "config.json") in said and f"{next(iter(wrong))} must be" in said


@pytest.mark.parametrize("count", [0, -1000, 1000.5, "1000", True, None])
def test_timesteps_that_are_no_count_are_named_with_their_file(count: object, model: Path) -> None:
    edit_json(model / "scheduler" / "scheduler_config.json", num_train_timesteps=count)
    assert f"{model / 'scheduler' / 'scheduler_config.json'}: num_train_timesteps must be a count" in refusal(model)


@pytest.mark.parametrize("scheduler", [None, [], "DDIMScheduler", ["diffusers", None], ["mine", "DDIMScheduler"]])
def test_index_that_names_no_scheduler_of_diffusers_is_named(scheduler: object, model: Path) -> None:
    edit_json(model / "model_index.json", scheduler=scheduler)
    assert f"{model / 'model_index.json'} names no scheduler" in refusal(model)


def test_width_that_the_heads_do_not_divide_is_named_with_its_file(model: Path) -> None:
    edit_json(model / "text_encoder" / "config.json", hidden_size=30)
    assert f"{model / 'text_encoder' / 'config.json'}: hidden_size 30" in refusal(model)


@pytest.mark.parametrize("name", [*CONFIGS, "tokenizer/tokenizer_config.json"])
def test_json_that_is_nested_too_deeply_is_named(name: str, model: Path) -> None:
    (model / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert str(model / name) in refusal(model)


@pytest.mark.parametrize("weight_map", [{"a": 1}, {}, {"a": ["b"]}, []])
def test_index_that_names_no_files_is_named(weight_map: object, model: Path) -> None:
    (model / WEIGHTS["unet"]).unlink()
    index = model / f"{WEIGHTS['unet']}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert str(index) in refusal(model)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}" + b"more than belongs",
        struct.pack("<Q", 13) + b'{"a":{"x":1}}',
        b"<html>the hub is down</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n",
    ],
    ids=["huge header", "list", "too long", "no offsets", "error page", "LFS pointer"],
)
def test_file_that_is_no_safetensors_is_named(content: bytes, model: Path) -> None:
    (model / WEIGHTS["unet"]).write_bytes(content)
    assert str(model / WEIGHTS["unet"]) in refusal(model)


def test_file_that_was_whole_before_is_checked_again_when_it_changes(model: Path) -> None:
    fingerprints = Fingerprints(model.parent / ".fingerprints.json")
    open_checkpoint(model, fingerprints)
    fingerprints.remember()
    path = model / WEIGHTS["vae"]
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(model)


def test_memory_of_hashes_that_is_no_such_thing_is_computed_again(model: Path) -> None:
    memory = model.parent / ".fingerprints.json"
    fingerprints = Fingerprints(memory)
    digests = open_checkpoint(model, fingerprints).digests
    fingerprints.remember()
    numbers = {path: [*known[:-1], 7] for path, known in json.loads(memory.read_text()).items()}
    for content in (json.dumps(numbers), "[" * 10**5):
        memory.write_text(content)
        assert open_checkpoint(model, Fingerprints(memory)).digests == digests


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_tokenizer_is_named(name: str, model: Path) -> None:
    (model / "tokenizer" / name).unlink()
    assert str(model / "tokenizer" / name) in refusal(model)


@pytest.mark.parametrize("kind", ["bin", "ckpt", "pt"])
@pytest.mark.parametrize("network", WEIGHTS)
def test_pickle_is_refused_unread(network: str, kind: str, model: Path) -> None:
    safe = model / WEIGHTS[network]
    unsafe = safe.with_suffix(f".{kind}")
    safe.unlink()
    unsafe.write_bytes(pickle.dumps({"weight": 1}))
    said = refusal(model)
    assert str(unsafe) in said
    assert "safetensors" in said


def test_pickle_beside_safetensors_is_left_alone(model: Path) -> None:
    expected = opened(model).revision
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert opened(model).revision == expected


def test_fp16_variant_serves_where_the_plain_file_is_missing(model: Path) -> None:
    path = model / WEIGHTS["unet"]
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert opened(model).digests["unet"]


def _shard(model: Path) -> Path:
    """Splits the UNet's weights over two files, as large models are published; returns the second."""
    from safetensors.torch import load_file, save_file

    path = model / WEIGHTS["unet"]
    tensors = load_file(path)
    names = sorted(tensors)
    halves = {"00001": names[: len(names) // 2], "00002": names[len(names) // 2 :]}
    files = {half: path.with_name(f"diffusion_pytorch_model-{half}-of-00002.safetensors") for half in halves}
    for half, inside in halves.items():
        save_file({name: tensors[name] for name in inside}, files[half], metadata={"format": "pt"})
    weight_map = {name: files[half].name for half, inside in halves.items() for name in inside}
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    path.unlink()
    return files["00002"]


def test_sharded_weights_are_opened(model: Path) -> None:
    _shard(model)
    assert opened(model).digests["unet"]


def test_missing_shard_is_named(model: Path) -> None:
    shard = _shard(model)
    shard.unlink()
    assert str(shard) in refusal(model)


def test_truncated_shard_is_named(model: Path) -> None:
    shard = _shard(model)
    shard.write_bytes(shard.read_bytes()[:-8])
    assert str(shard) in refusal(model)


def _flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _reverse_lines(path: Path) -> None:
    path.write_text("\n".join(reversed(path.read_text().splitlines())))


@pytest.mark.parametrize("network", WEIGHTS)
def test_one_changed_bit_of_weights_is_another_network_and_revision(network: str, model: Path) -> None:
    before = opened(model)
    _flip_last_bit(model / WEIGHTS[network])
    after = opened(model)
    assert after.revision != before.revision
    assert [part for part in WEIGHTS if after.digests[part] != before.digests[part]] == [network]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"),
        lambda model: edit_json(model / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        lambda model: edit_json(model / "unet" / "config.json", attention_head_dim=8),
        lambda model: edit_json(model / "tokenizer" / "special_tokens_map.json", pad_token="!"),
        lambda model: _reverse_lines(model / "tokenizer" / "merges.txt"),
    ],
    ids=["scheduler", "its class", "unet", "padding", "merges"],
)
def test_changed_configuration_is_another_revision(change: Callable[[Path], None], model: Path) -> None:
    before = opened(model).revision
    change(model)
    assert opened(model).revision != before


def test_revision_does_not_depend_on_where_the_folder_stands(model: Path, tmp_path: Path) -> None:
    expected = opened(model).revision
    assert opened(model.rename(tmp_path / "elsewhere")).revision == expected


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "FluxPipeline", None])
def test_model_of_another_family_is_refused(kind: str | None, model: Path) -> None:
    edit_json(model / "model_index.json", _class_name=kind)
    assert str(kind) in refusal(model)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_quantised_networks_are_refused(part: str, model: Path) -> None:
    edit_json(model / part / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantization_config" in refusal(model) and f"{part}/config.json" in refusal(model)


def test_a_unet_with_channels_of_another_kind_is_refused(model: Path) -> None:
    edit_json(model / "unet" / "config.json", in_channels=8)
    assert "8" in refusal(model)
