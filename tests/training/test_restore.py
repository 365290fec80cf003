"""An exported model can be trained on where its checkpoints are gone."""

import pytest

torch = pytest.importorskip("torch")

from training.export import OUTPUT, pipeline  # noqa: E402
from training.loop import Plan, Trainer  # noqa: E402
from training.restore import restore  # noqa: E402


def test_restored_checkpoints_hold_the_exported_weights_and_can_be_resumed(tmp_path):
    assert restore(OUTPUT, tmp_path) == ["vae.pt", "text.pt", "unet.pt"]
    assert restore(OUTPUT, tmp_path) == []
    torch.save({"scale": 0.25}, tmp_path / "latents.pt")
    made = pipeline(tmp_path)
    from diffusers import StableDiffusionPipeline

    shipped = StableDiffusionPipeline.from_pretrained(OUTPUT, dtype=torch.float32)
    for part in ("vae", "text_encoder", "unet"):
        expected = getattr(shipped, part).state_dict()
        for name, value in getattr(made, part).state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    trainer = Trainer(made.vae, Plan(rate=1e-4, steps=1), tmp_path / "vae.pt")
    trainer.load()
    assert trainer.step == 0
    trainer.run(lambda step, progress, generator: made.vae.post_quant_conv.weight.square().sum())
    assert trainer.step == 1
