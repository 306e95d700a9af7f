"""RadGraph F1 (Eq. 4's s_rg) through the `radgraph` package, its models and its rewards of a pair; seconds to import.

The package's own `F1RadGraph` annotates the references anew at every call, with gradients on, and does not run on
transformers 5. Here each distinct text is annotated once and remembered; `restore_tokenizer_methods` mends the rest.
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

HUB = "hf-hub:StanfordAIMI/RRG_scorers"  # where the package fetches its archives
ARCHIVE = ("config.json", "weights.th", "vocabulary/non_padded_namespaces.txt")


def restore_tokenizer_methods() -> None:
    """The one compatibility place: two methods that transformers 5 dropped and the package's AllenNLP still calls."""
    base = PreTrainedTokenizerBase
    if not hasattr(base, "encode_plus"):
        base.encode_plus = lambda self, *args, **kwargs: self(*args, **kwargs)
    if not hasattr(base, "build_inputs_with_special_tokens"):
        base.build_inputs_with_special_tokens = lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id]


def unpack(archive: Path, place: Path) -> None:
    """Unpack a model's archive to the folder `place`, all of it or nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch, tarfile.open(archive) as tar:
        tar.extractall(f"{scratch}/archive", filter="data")
        if not (place / ARCHIVE[0]).is_file():  # another process may have been faster
            Path(scratch, "archive").rename(place)


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
                unpack(local_file(f"{HUB}/{model_type}.tar.gz"), place)
            for name in ARCHIVE:
                (place / name).open("rb").close()  # the package would fetch what is not there
            # on the CPU, where the package reads its weights with weights_only=True
            model = package.RadGraph(model_type=model_type, model_cache_dir=str(place.parent), cuda=-1)
        model.device = torch.device(device)
        self.model, self.reward_level = model.to(device).eval().requires_grad_(False), reward_level
        self.cache = OrderedDict()

    def __call__(self, candidates: list[str], references: list[str]) -> list[float]:
        read = self.annotations([*candidates, *references])
        pairs = zip(read[: len(candidates)], read[len(candidates) :], strict=True)
        return [float(compute_reward(ours, theirs, self.reward_level)) for ours, theirs in pairs]

    def annotations(self, texts: list[str]) -> list[dict]:
        """The package's annotation of each text; an empty text has no entity."""
        return [json.loads(row) for row in cached(self.cache, texts, self.annotate)]

    @torch.no_grad()
    def annotate(self, texts: list[str]) -> list[str]:
        """The annotations asked of the model, as JSON: a tenth of the dict's size."""
        read = [text for text in texts if text.strip()]
        found = self.model(read) if read else {}
        if len(found) < len(read):  # the package prints and goes on
            lost = [text for i, text in enumerate(read) if str(i) not in found]
            raise ValueError(f"radgraph: the package could not annotate {len(lost)} text(s), first '{lost[0][:80]}'")
        rows = {text: found[str(i)] for i, text in enumerate(read)}
        return [json.dumps(rows.get(text, {"text": "", "entities": {}})) for text in texts]
