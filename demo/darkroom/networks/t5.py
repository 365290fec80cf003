"""T5's encoder (Raffel et al. 2020), as transformers of pictures read it: every token, padding too."""

from torch import Tensor, nn

from darkroom.contract import Stage


def encoder(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a text stage."""
    return T5(network)


class T5(nn.Module):
    """(B, L) token ids -> (B, L, D) last hidden states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids.long()).last_hidden_state.float()
