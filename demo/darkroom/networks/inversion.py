"""Textual inversions (Gal et al. 2022) in a text encoder: rows behind those of the words that it knows."""

import torch
from safetensors import safe_open
from torch import nn

from darkroom.contract import Inversion
from darkroom.errors import InvalidRequest


def learn(network: nn.Module, part: str, inversion: Inversion) -> None:
    """Gives `network`, which is `part` of a model, the vectors (N, D) of a word, for the ids that come next.

    Raises `InvalidRequest` for vectors that hold what is no number.
    """
    table = network.get_input_embeddings()
    with safe_open(inversion.path, "pt") as file:
        vectors = file.get_tensor(inversion.tensors[part]).to(table.weight.dtype)
    if not vectors.isfinite().all():
        raise InvalidRequest(f"the embedding {inversion.path} holds NaN or infinity: fetch it again, or use another.")
    table.weight = nn.Parameter(torch.cat([table.weight.data, vectors.reshape(-1, table.embedding_dim)]))
    table.num_embeddings = len(table.weight)
