"""RadGraph F1 (Eq. 4's s_rg) through the `radgraph` package: its models and its rewards of a pair.

The package's own `F1RadGraph` annotates the references anew at every call, with gradients on, and does not run on
transformers 5. Here each distinct text is annotated once and remembered; `restore_tokenizer_methods` mends the rest.
"""

import json
import pickle
import tarfile
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from scorers.clinical import cached, first_line, local_file

MODEL_TYPES = ("radgraph", "radgraph-xl", "modern-radgraph-xl")
LEVELS = ("simple", "partial", "complete")
HUB = "hf-hub:StanfordAIMI/RRG_scorers"  # where the package fetches its archives
ARCHIVE = ("config.json", "weights.th", "vocabulary/non_padded_namespaces.txt")


def restore_tokenizer_methods() -> None:
    """The one compatibility place: two methods that transformers 5 dropped and the package's AllenNLP still calls."""
    from transformers import PreTrainedTokenizerBase as Base

    if not hasattr(Base, "encode_plus"):
        Base.encode_plus = lambda self, *args, **kwargs: self(*args, **kwargs)
    if not hasattr(Base, "build_inputs_with_special_tokens"):
        Base.build_inputs_with_special_tokens = lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id]


def unpack(model_type: str, home: Path) -> None:
    """Fetch the archive of a model type and unpack it to `home`/<model type>, all of it or nothing."""
    archive = local_file(f"{HUB}/{model_type}.tar.gz", "radgraph")
    home.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=home) as scratch, tarfile.open(archive) as tar:
            tar.extractall(f"{scratch}/archive", filter="data")
            Path(scratch, "archive").rename(home / model_type)
    except (OSError, EOFError, tarfile.TarError) as error:
        if (home / model_type / ARCHIVE[0]).is_file():  # another process was faster
            return
        raise ValueError(f"radgraph: cannot unpack {archive}: {first_line(error)}") from None


def load_radgraph(model_type: str, folder: str = "", device: str | torch.device = "cpu") -> torch.nn.Module:
    """The package's `RadGraph`, frozen: model(texts) -> {"0": annotation, ...}.

    folder holds the archive in `<folder>/<model type>/`; empty = the package's cache, filled from the hub where it has
    none. The encoder that the archive's config.json names (a folder or hub name) gives config and tokenizer. Raises
    ValueError (one line) for what cannot be loaded.
    """
    from radgraph import RadGraph
    from radgraph.radgraph import CACHE_DIR

    restore_tokenizer_methods()
    home = Path(folder or CACHE_DIR)
    place = home / model_type
    if not folder and not any(place.glob("*")):
        unpack(model_type, home)
    for name in ARCHIVE:
        if not (place / name).is_file():
            raise ValueError(f"radgraph: {place / name} does not exist; unpack {model_type}.tar.gz into {place}")
    try:
        # on the CPU, where the package reads its weights with weights_only=True
        model = RadGraph(model_type=model_type, model_cache_dir=str(home), cuda=-1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        hint = "; config.json's model_name, the encoder, must be a folder or a hub name" * isinstance(error, OSError)
        raise ValueError(f"radgraph: cannot load {place}: {' '.join(str(error).split())[:200]}{hint}") from None
    model.device = torch.device(device)
    return model.to(device).eval().requires_grad_(False)


class PackageRadGraph:
    """Eq. 4's s_rg behind the interface of `radgraph_rules.RuleRadGraph`, with the package's model and rewards.

    scorer(hyps=[...], refs=[...]) -> (mean, scores, annotations of hyps, annotations of refs), one entry per pair. As
    in the package, and unlike the rules, two texts without an entity score 0, two empty ones among them.
    """

    def __init__(self, model_type: str, folder: str = "", reward_level: str = "partial", device="cpu"):
        for what, value, known in (("model type", model_type, MODEL_TYPES), ("reward level", reward_level, LEVELS)):
            if value not in known:
                raise ValueError(f"radgraph: {what} '{value}' is none of {', '.join(known)}")
        self.model, self.reward_level = load_radgraph(model_type, folder, device), reward_level
        self.cache = OrderedDict()

    @torch.no_grad()
    def annotate(self, texts: list[str]) -> list[str]:
        """The package's annotation of each text as JSON, a tenth of the dict's size; an empty text has no entity."""
        read = [text for text in texts if text.strip()]
        found = self.model(read) if read else {}
        if len(found) < len(read):  # the package prints and goes on
            lost = [text for i, text in enumerate(read) if str(i) not in found]
            raise ValueError(f"radgraph: the package could not annotate {len(lost)} text(s), first '{lost[0][:80]}'")
        rows = {text: found[str(i)] for i, text in enumerate(read)}
        return [json.dumps(rows.get(text, {"text": "", "entities": {}})) for text in texts]

    def __call__(self, hyps: list[str], refs: list[str]) -> tuple[float, list[float], list[dict], list[dict]]:
        from radgraph.rewards import compute_reward

        rows = [json.loads(row) for row in cached(self.cache, [*hyps, *refs], self.annotate)]
        ours, theirs = rows[: len(hyps)], rows[len(hyps) :]
        scores = [float(compute_reward(a, b, self.reward_level)) for a, b in zip(ours, theirs, strict=True)]
        return float(np.mean(scores)) if scores else 0.0, scores, ours, theirs
