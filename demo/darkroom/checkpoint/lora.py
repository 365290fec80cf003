"""LoRA files (Hu et al. 2021): small changes to a model's weights, fused into them before they are exported."""

from pathlib import Path

from darkroom.checkpoint.folder import SAFETENSORS, read_header
from darkroom.contract import Lora
from darkroom.errors import InvalidRequest
from darkroom.families import every_family
from darkroom.store.fingerprints import Fingerprints

DEFAULT_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file in a folder or repository."""

OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
"""Words in tensors' names that tell of relatives that are not fused as LoRA is."""


def open_lora(path: Path, weight: float, scale: float, fingerprints: Fingerprints) -> Lora:
    """Checks a LoRA as `check_lora` does, and identifies it."""
    path, networks = check_lora(path)
    try:
        return Lora(path.absolute(), fingerprints.sha256(path), networks, weight, scale)
    except OSError as error:
        raise InvalidRequest(f"the LoRA {path} cannot be read: {error.strerror}.") from None


def check_lora(path: Path) -> tuple[Path, frozenset[str]]:
    """The LoRA's file, where a folder is given the one in it; and the networks that it holds changes for.

    Raises `InvalidRequest` for what is not a whole LoRA of a known layout.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1 and not (path / DEFAULT_NAME).is_file():
            raise InvalidRequest(
                f"the folder {path} holds {len(files)} safetensors files: name the LoRA that is meant."
            )
        path = path / DEFAULT_NAME if len(files) != 1 else files[0]
    if not path.is_file():
        raise InvalidRequest(
            f"the LoRA {path} does not exist; prompts go before --lora-path, which takes several files."
        )
    if path.suffix.lower() != SAFETENSORS:
        raise InvalidRequest(f"the LoRA {path} is not a safetensors file: no other kind is loaded.")
    found = set()
    prefixes_of = {name: part.lora for family in every_family() for name, part in family.parts.items() if part.lora}
    for name in read_header(path):
        kind = next((kind for word, kind in OTHER_KINDS.items() if word in name), None)
        if kind:
            raise InvalidRequest(f"{path} is a {kind} file, not a LoRA: it cannot be fused here.")
        network = next((part for part, prefixes in prefixes_of.items() if name.startswith(prefixes)), None)
        if network is None or "lora" not in name:
            raise InvalidRequest(f"{path} holds {name!r}: no LoRA layout known here (diffusers', kohya's) has it.")
        found.add(network)
    if not found:
        raise InvalidRequest(f"{path} holds no tensors.")
    return path, frozenset(found)
