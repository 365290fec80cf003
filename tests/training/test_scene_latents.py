"""From artwork to a pipeline of 256 pixels: each stage reads what the one before wrote."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("resvg_py")

from training import export, grammar, networks, scene_latents, scenes, tokenizer, train_text, train_unet  # noqa: E402
from training.loop import Plan, Trainer  # noqa: E402
from training.vocabulary import Thing  # noqa: E402

THINGS = [Thing(f"1f{number:03x}", f"thing{number}", 3, (f"other{number}",)) for number in range(6)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with six things in three styles, fresh networks, and sixteen scenes encoded."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "vocabulary.json").write_text(json.dumps([asdict(thing) for thing in THINGS]), "utf-8")
    index = [(style, thing.code) for style in grammar.STYLES for thing in THINGS]
    (folder / "artwork.json").write_text(json.dumps(index), "utf-8")
    rgba = np.zeros((len(index), 256, 256, 4), np.uint8)
    for number, picture in enumerate(rgba):
        picture[30:220, 30:220] = (*np.random.default_rng(number).integers(0, 256, 3), 255)
    np.save(folder / "artwork.npy", rgba)
    Trainer(networks.vae_256(), Plan(rate=0.0), folder / "vae.pt").save()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_latents, "CHUNK", 8)
        run(patch, scene_latents, folder, "--count", "16")
        run(patch, tokenizer, folder, "--scenes")
    return folder


def run(patch: pytest.MonkeyPatch, module, folder: Path, *flags: str) -> None:
    patch.setattr("sys.argv", [module.__name__, "--work", str(folder), *flags])
    module.main()


def test_a_scene_has_its_number_for_ever_and_even_ones_are_every_picture_in_turn(work: Path) -> None:
    cache = scene_latents.SceneCache.load(work)
    assert cache.latents.shape == (16, 32, 16, 16)
    assert [scene.parts[0].thing.code for scene in cache.scenes[:12:2]] == [thing.code for thing in THINGS]
    assert cache.scenes == scene_latents.SceneCache.load(work).scenes
    assert not any(map(scenes.held_out, cache.scenes))
    odd = cache.scenes[1::2]
    assert all(s.relation or s.size or s.count > 1 or s.parts[0].colour for s in odd if scenes.colourable(THINGS[0]))
    assert cache.latents.float().std().item() == pytest.approx(1, abs=0.01)


def test_what_is_encoded_is_not_encoded_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "scenes").iterdir()}
    monkeypatch.setattr(scene_latents, "CHUNK", 8)
    run(monkeypatch, scene_latents, work, "--count", "16")
    assert {path: path.stat().st_mtime_ns for path in (work / "scenes").iterdir()} == before and len(before) == 2


def test_captions_come_with_the_latents_of_their_scene(work: Path) -> None:
    cache = scene_latents.SceneCache.load(work)
    texts, latents, again = cache.draw(64, torch.Generator().manual_seed(2))
    assert torch.equal(latents, again)
    for text, one in zip(texts, latents, strict=True):
        (which,) = [i for i, each in enumerate(cache.latents.float()) if torch.equal(each, one)]
        names = cache.scenes[which].parts[0].thing.words
        stems = [name[:5] for name in names]  # an s of the plural and slips of the fingers stay apart
        assert not text or any(stem[:3] in text.lower() for stem in stems)


def test_text_encoder_and_unet_are_trained_on_them_and_exported(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, train_text, work, "--scenes", "--steps", "1", "--batch", "4")
    run(monkeypatch, train_unet, work, "--scenes", "--steps", "1", "--batch", "2", "--pool", "4")
    pipe = export.pipeline(work, scenes=True)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a thing1", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert made.shape == (1, 256, 256, 3) and np.isfinite(made).all()
    assert pipe.vae.config.scaling_factor == pytest.approx(scene_latents.SceneCache.load(work).scale)
