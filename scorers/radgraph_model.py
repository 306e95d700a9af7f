"""RadGraph F1 (Eq. 4's s_rg) through the `radgraph` package, its models and its rewards of a pair; seconds to import.

The package's own `F1RadGraph` annotates the references anew at every call, with gradients on, and does not run on
transformers 5. Here each distinct text is annotated once and remembered.
"""

import json
import re
import tarfile
from pathlib import Path

import torch
from radgraph import radgraph as package
from radgraph.rewards import compute_reward
from transformers import AutoConfig, PreTrainedTokenizerBase

from formats.files import read_json
from running.folder import atomic_folder, lock
from running.weights import check_torch_file, load_tokenizer, loading, require_finite_tensors
from scorers.frozen import cached, local_file, pack_linears, plain

LONGEST = 512  # words and marks of a text that are read: time grows with their cube, to about a minute for these


def restore_tokenizer_methods() -> None:
    """The one compatibility place: two methods that transformers 5 dropped and the package's AllenNLP still calls."""
    base = PreTrainedTokenizerBase
    base.encode_plus = base.__call__
    base.build_inputs_with_special_tokens = lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id]


def unpack(model_type: str, place: Path) -> None:
    """Fetch a model's archive and unpack it to the folder `place`, all of it or nothing."""
    archive = local_file(f"hf-hub:StanfordAIMI/RRG_scorers/{model_type}.tar.gz")
    with lock(place.with_name(f"{model_type}.lock"), wait=True):
        if not any(place.glob("*")):  # else another process was faster
            with atomic_folder(place) as unfinished, tarfile.open(archive) as tar:
                tar.extractall(unfinished, filter="data")


def refuse_code(config: dict) -> None:
    """ValueError where an archive's config.json names code, as AllenNLP imports and calls what a word in model.modules
    names (its true settings are numbers), or an encoder that brings code or no tokenizer."""
    for word in re.findall(r'"(?:[^"\\]|\\.)*":?', json.dumps(config["model"]["modules"])):
        if not word.endswith(":"):
            raise ValueError(f"model.modules holds {word}, which may name code; only numbers are taken there")
    for table in (config["model"]["embedder"]["token_embedders"], config["dataset_reader"]["token_indexers"]):
        AutoConfig.from_pretrained(table["bert"]["model_name"], trust_remote_code=False)
        load_tokenizer(table["bert"]["model_name"])


class PackageRadGraph:
    """Eq. 4's s_rg of pairs with the package's model and rewards: scorer(candidates, references) -> floats in [0, 1].

    model_type: radgraph, radgraph-xl or modern-radgraph-xl. folder holds the archive in `<folder>/<model type>/`; empty
    = the package's cache, filled from the hub. The encoder that its config.json names (a folder or hub name) gives
    config and tokenizer. reward_level: simple, partial or complete. As in the package, two texts without an entity
    score 0. ValueError (one line) for what cannot be loaded.
    """

    def __init__(self, model_type: str, folder: str = "", reward_level: str = "partial", device="cpu"):
        restore_tokenizer_methods()
        place = Path(folder or package.CACHE_DIR) / model_type
        advice = f"unpack {model_type}.tar.gz into it; config.json's model_name, the encoder, is a folder or a hub name"
        with loading(f"radgraph: cannot load {place}", advice):
            if not folder and not any(place.glob("*")):
                unpack(model_type, place)
            refuse_code(read_json(place / "config.json"))
            check_torch_file(place / "weights.th")
            # on the CPU, where the package reads its weights with weights_only=True
            model = package.RadGraph(model_type=model_type, model_cache_dir=str(place.parent), cuda=-1)
            require_finite_tensors(model.eval().requires_grad_(False), place)
            model(["No effusion. " * 16])  # settings that no text, or no long one, can be annotated with show here
        model.device = torch.device(device)
        self.model, self.reward_level, self.cache = pack_linears(model.to(device)), reward_level, {}

    def __call__(self, candidates: list[str], references: list[str]) -> list[float]:
        pairs = zip(self.annotations(candidates), self.annotations(references), strict=True)
        return [float(compute_reward(ours, theirs, self.reward_level)) for ours, theirs in pairs]

    def annotations(self, texts: list[str]) -> list[dict]:
        """The package's annotation of each text, one that nobody else holds; a text without a word has no entity."""
        rows = cached(self.cache, list(map(plain, texts)), lambda new: list(map(self.annotate, new)))
        return list(map(json.loads, rows))

    @torch.no_grad()
    def annotate(self, text: str) -> str:
        """The annotation asked of the model, which reads one text at a time, as JSON: a tenth of the dict's size."""
        read = re.match(rf"\s*(?:(?:\w+|[^\w\s])\s*){{0,{LONGEST}}}", text)[0]
        found = self.model([read]) if text else {}
        if text and not found:  # the package prints and goes on, and so does a run
            print(f"radgraph: the package could not annotate {text[:80]!r}, which scores 0")
        return json.dumps(found.get("0", {"text": text, "entities": {}}))
