"""Textual inversions (Gal et al. 2022): files of vectors for words that a text encoder does not know.

AUTOMATIC1111's files have `emb_params`, and for SDXL `clip_l` and `clip_g`; diffusers' have a tensor that is called as
the word is. From a file alone, it is known which text encoder each tensor is for.
"""

from pathlib import Path

from darkroom.checkpoint.folder import SAFETENSORS, Checkpoint, read_header
from darkroom.checkpoint.original import some
from darkroom.contract import Inversion
from darkroom.errors import InvalidRequest
from darkroom.store.fingerprints import Fingerprints

A1111 = "emb_params"

CONVERT = (
    "python -c 'import sys, torch; from safetensors.torch import save_file; made = torch.load(sys.argv[1], "
    'weights_only=True); made = made.get("string_to_param", made); save_file({"emb_params" if name == "*" else name: '
    "each.contiguous() for name, each in made.items()}, sys.argv[2])' "
)
"""Reads a pickle without running what is in it; its layouts are A1111's and diffusers'."""


def check_inversion(path: Path) -> None:
    """Raises `InvalidRequest` for what is not a whole safetensors file of vectors."""
    if not path.is_file():
        raise InvalidRequest(
            f"the embedding {path} does not exist; prompts go before --embedding, which takes several files."
        )
    if path.suffix.lower() != SAFETENSORS:
        raise InvalidRequest(
            f"the embedding {path} is not a safetensors file: no other kind is loaded. What torch has saved is "
            f"converted by: {CONVERT}{path} {path.with_suffix(SAFETENSORS)}"
        )
    shapes = {name: tensor["shape"] for name, tensor in read_header(path).items()}
    if not shapes or not all(1 <= len(shape) <= 2 and all(shape) for shape in shapes.values()):
        raise InvalidRequest(f"the embedding {path} holds {shapes}, and no vectors (N, D) alone.")


def open_inversion(path: Path, word: str | None, checkpoint: Checkpoint, fingerprints: Fingerprints) -> Inversion:
    """The file's vectors for each text encoder of a model, and the `word` for them: by default the file's name without
    its ending, or the one that a file of diffusers' says.

    Raises `InvalidRequest` for what is no such file, or one for another model.
    """
    check_inversion(path)
    header = read_header(path)
    names = {part: checkpoint.family.parts[part].inversion for part in checkpoint.texts}
    if len(header) == len(names) == 1 and all(names.values()):
        (only,) = header
        if word is None and only not in (A1111, *names.values()):
            word = only
        names = dict.fromkeys(names, only)
    if lacking := [name or part for part, name in names.items() if name not in header]:
        raise InvalidRequest(
            f"the embedding {path} holds {some(list(header))}, and no {some(lacking)}: it is for another model."
        )
    for part, name in names.items():
        width, own = header[name]["shape"][-1], checkpoint.config(part)["hidden_size"]
        if width != own:
            raise InvalidRequest(
                f"the embedding {path} is for another model: its vectors have {width} numbers, and the {part}'s {own}."
            )
    counts = {1 if len(shape) == 1 else shape[0] for shape in (header[name]["shape"] for name in names.values())}
    if len(counts) > 1:
        raise InvalidRequest(f"the embedding {path} has not as many vectors for each text encoder.")
    return Inversion(path.absolute(), fingerprints.sha256(path), word or path.stem, names, counts.pop())
