"""CLIP's text encoders (Radford et al. 2021), as Stable Diffusion, SDXL and Flux read them."""

from torch import Tensor, nn

from darkroom.contract import Stage


def encoder(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a text stage."""
    wrapper = PenultimateClip if stage.options.get("penultimate") else Clip
    return wrapper(network, int(stage.options["clip_skip"]))


def pooled(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a text stage that gives the prompt's gist alone."""
    return PooledClip(network)


class Clip(nn.Module):
    """(B, 77) token ids -> (B, 77, D) hidden states, `clip_skip` layers before the last, normalised."""

    def __init__(self, encoder: nn.Module, clip_skip: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.clip_skip = clip_skip

    def forward(self, input_ids: Tensor) -> Tensor:
        if not self.clip_skip:
            return self.encoder(input_ids=input_ids.long()).last_hidden_state.float()
        states = self.encoder(input_ids=input_ids.long(), output_hidden_states=True).hidden_states
        inner = getattr(self.encoder, "text_model", self.encoder)
        return inner.final_layer_norm(states[-(self.clip_skip + 1)]).float()


class PenultimateClip(Clip):
    """(B, 77) token ids -> (B, 77, D) hidden states of the layer before the last, as they are.

    `clip_skip` leaves out more layers. An encoder with a projection also gives its pooled output (B, P).
    """

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output = self.encoder(input_ids=input_ids.long(), output_hidden_states=True)
        hidden = output.hidden_states[-(self.clip_skip + 2)].float()
        return (hidden, output.text_embeds.float()) if hasattr(output, "text_embeds") else hidden


class PooledClip(nn.Module):
    """(B, 77) token ids -> (B, P), the normalised hidden state of the token that ends the prompt."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids.long()).pooler_output.float()
