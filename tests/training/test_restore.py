"""An exported model can be trained on where its checkpoints are gone."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from training.export import MODELS, pipeline  # noqa: E402
from training.loop import Plan, Trainer  # noqa: E402
from training.restore import restore  # noqa: E402


@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        ("emoji", ["vae.pt", "text.pt", "unet.pt"]),
        ("emoji-turbo", ["vae.pt", "text.pt", "turbo.pt"]),
        ("emoji-xl", ["vae.pt", "text_xl.pt", "unet_xl.pt"]),
    ],
)
def test_restored_checkpoints_hold_the_exported_weights_and_can_be_resumed(
    name: str, checkpoints: list[str], tmp_path: Path
) -> None:
    assert restore(MODELS / name, tmp_path) == checkpoints
    assert restore(MODELS / name, tmp_path) == []
    torch.save({"scale": 0.25}, tmp_path / "latents.pt")
    made = pipeline(tmp_path, model=name)
    from diffusers import DiffusionPipeline

    shipped = DiffusionPipeline.from_pretrained(MODELS / name, dtype=torch.float32)
    networks = [part for part, module in shipped.components.items() if isinstance(module, torch.nn.Module)]
    assert len(networks) == (4 if name == "emoji-xl" else 3)
    for part in networks:
        expected = getattr(shipped, part).state_dict()
        for name, value in getattr(made, part).state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    trainer = Trainer(made.vae, Plan(rate=1e-4, steps=1), tmp_path / "vae.pt")
    trainer.load()
    assert trainer.step == 0
    trainer.run(lambda step, progress, generator: made.vae.post_quant_conv.weight.square().sum())
    assert trainer.step == 1
