"""A stranger's model with random weights, and the plain torch loop that its pictures are held against."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.networks import StrangerTransformer, joined
from tests.support import (
    FLOW_SCHEDULER_CONFIG,
    SENTENCE,
    louder,
    silence_libraries,
    tiny_t5,
    tiny_text,
    write_tokenizer,
)

CHANNELS = 16
SCALE, SHIFT = 1.3, 0.12

SCHEDULER = FLOW_SCHEDULER_CONFIG | {"shift": 1.0}


def write_stranger(folder: Path) -> Path:
    """Writes the model, whose pictures are 64x64 pixels."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    silence_libraries()
    vocabulary = write_tokenizer(folder / "words_tokenizer")
    torch.manual_seed(99)
    words = CLIPTextModel(tiny_text(vocabulary, 24, 2, projection_dim=24))
    sentences = tiny_t5(folder / "sentences_tokenizer", 40)
    flow = StrangerTransformer(CHANNELS)
    vae = AutoencoderKL(
        sample_size=64,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    louder(words, 40, "embedding")
    louder(sentences, 20, "shared")
    louder(flow, 12, "text")
    louder(flow, 4, "qkv", "out.weight", "pixels.weight")
    louder(vae, 4, "decoder.conv_out.weight")
    parts = {"words": words, "sentences": sentences, "flow": flow, "pixels": vae}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {
        "_class_name": "StrangerPipeline",
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "words": ["transformers", "CLIPTextModel"],
        "words_tokenizer": ["transformers", "CLIPTokenizer"],
        "sentences": ["transformers", "T5EncoderModel"],
        "sentences_tokenizer": ["transformers", "T5Tokenizer"],
        "flow": ["tests.families.networks", "StrangerTransformer"],
        "pixels": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class PlainLoop:
    """The same model in torch and diffusers' own scheduler, float32, a CPU generator an image."""

    def __init__(self, model: Path) -> None:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        self.words = (
            CLIPTokenizer.from_pretrained(model / "words_tokenizer"),
            CLIPTextModel.from_pretrained(model / "words"),
        )
        self.sentences = (
            T5Tokenizer.from_pretrained(model / "sentences_tokenizer"),
            T5EncoderModel.from_pretrained(model / "sentences"),
        )
        self.flow = StrangerTransformer.from_pretrained(model / "flow")
        self.vae = AutoencoderKL.from_pretrained(model / "pixels")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler")

    def read(self, prompt: str) -> Any:
        """The text as the transformer has it: (1, 77 + 16, 40)."""
        read = []
        for (tokenizer, encoder), length in ((self.words, 77), (self.sentences, SENTENCE)):
            ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            read.append(encoder(input_ids=ids.input_ids).last_hidden_state)
        return joined(*read)

    def draw(
        self,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        size: tuple[int, int] = (64, 64),
        negative: str = "",
    ) -> np.ndarray:
        """A picture (H, W, 3) uint8."""
        import torch
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        height, width = size
        with torch.no_grad():
            text, away = self.read(prompt), self.read(negative)
            generator = torch.Generator("cpu").manual_seed(seed)
            latents = torch.randn((1, CHANNELS, height // 8, width // 8), generator=generator)
            tokens, config = (height // 16) * (width // 16), self.scheduler.config
            line = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            self.scheduler.set_timesteps(steps, mu=calculate_shift(tokens, *line))
            for timestep in self.scheduler.timesteps:
                time = timestep[None] / 1000
                made = self.flow(latents, time, text)
                if guidance > 1:
                    without = self.flow(latents, time, away)
                    made = without + guidance * (made - without)
                latents = self.scheduler.step(made, timestep, latents, return_dict=False)[0]
            image = self.vae.decode(latents / SCALE + SHIFT).sample[0]
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
