"""RadGraph F1 (Eq. 4's s_rg) through the `radgraph` package, its models and its rewards of a pair; seconds to import.

The package's own `F1RadGraph` annotates the references anew at every call, with gradients on, and does not run on
transformers 5. Here each distinct text is annotated once and remembered.
"""

import json
import tarfile
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from radgraph import radgraph as package
from radgraph.rewards import compute_reward
from transformers import PreTrainedTokenizerBase

from scorers.frozen import cached, loading, local_file


def restore_tokenizer_methods() -> None:
    """The one compatibility place: two methods that transformers 5 dropped and the package's AllenNLP still calls."""
    base = PreTrainedTokenizerBase
    base.encode_plus = base.__call__
    base.build_inputs_with_special_tokens = lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id]


def unpack(archive: Path, place: Path) -> None:
    """Unpack a model's archive to the folder `place`, all of it or nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch, tarfile.open(archive) as tar:
        tar.extractall(f"{scratch}/archive", filter="data")
        try:
            Path(scratch, "archive").rename(place)
        except OSError:
            if not (place / "config.json").is_file():  # else another process was faster
                raise


class PackageRadGraph:
    """Eq. 4's s_rg of pairs with the package's model and rewards: scorer(candidates, references) -> floats in [0, 1].

    model_type: radgraph, radgraph-xl or modern-radgraph-xl. folder holds the archive in `<folder>/<model type>/`; empty
    = the package's cache, filled from the hub where it has none. The encoder that the archive's config.json names (a
    folder or hub name) gives config and tokenizer. reward_level: simple, partial or complete. As in the package, and
    unlike the rules, two texts without an entity score 0. ValueError (one line) for what cannot be loaded.
    """

    def __init__(self, model_type: str, folder: str = "", reward_level: str = "partial", device="cpu"):
        restore_tokenizer_methods()
        place = Path(folder or package.CACHE_DIR) / model_type
        advice = f"unpack {model_type}.tar.gz into it; config.json's model_name, the encoder, is a folder or a hub name"
        with loading("radgraph", place, advice):
            if not folder and not any(place.glob("*")):
                unpack(local_file(f"hf-hub:StanfordAIMI/RRG_scorers/{model_type}.tar.gz"), place)
            (place / "config.json").stat()  # the package would fetch an archive into an empty folder
            # on the CPU, where the package reads its weights with weights_only=True
            model = package.RadGraph(model_type=model_type, model_cache_dir=str(place.parent), cuda=-1)
        model.device = torch.device(device)
        self.model, self.reward_level = model.to(device).eval().requires_grad_(False), reward_level
        self.cache = OrderedDict()

    def __call__(self, candidates: list[str], references: list[str]) -> list[float]:
        pairs = zip(self.annotations(candidates), self.annotations(references), strict=True)
        return [float(compute_reward(ours, theirs, self.reward_level)) for ours, theirs in pairs]

    def annotations(self, texts: list[str]) -> list[dict]:
        """The package's annotation of each text; an empty text has no entity."""
        return [json.loads(row) for row in cached(self.cache, texts, lambda new: list(map(self.annotate, new)))]

    @torch.no_grad()
    def annotate(self, text: str) -> str:
        """The annotation asked of the model, which reads one text at a time, as JSON: a tenth of the dict's size."""
        found = self.model([text]) if text.strip() else {"0": {"text": "", "entities": {}}}
        if not found:  # the package prints and goes on
            raise ValueError(f"radgraph: the package could not annotate '{text[:80]}'")
        return json.dumps(found["0"])
