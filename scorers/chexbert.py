"""CheXbert [Smit et al. 2020, arXiv 2004.09167]: 14 labels of a report, which Eq. 4's s_cx compares.

Network, checkpoint layout and reading of a text are those of the `f1chexbert` package.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, BertModel

from running.weights import check_torch_file, load_tokenizer, loading, require_finite_tensors, require_rows
from scorers.frozen import cached, local_file, of_like_length, pack_linears, plain

CHEXPERT_LABELS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding")
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)  # CheXbert's classes; No Finding knows only the first two


class CheXbert(torch.nn.Module):
    """BERT with a linear head per label on the [CLS] state: 13 of 4 classes, No Finding's of 2."""

    def __init__(self, bert: BertModel):
        super().__init__()
        self.bert, width = bert, bert.config.hidden_size
        self.linear_heads = torch.nn.ModuleList(torch.nn.Linear(width, classes) for classes in (*[4] * 13, 2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        """Token ids and mask (n, T) -> 14 tensors of logits: 13 of (n, 4), the last (n, 2)."""
        state = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return [head(state) for head in self.linear_heads]


def load_chexbert(checkpoint: str | Path, bert_folder: str | Path, device: str | torch.device = "cpu") -> "Labeller":
    """The frozen labeller of a CheXbert checkpoint, {"model_state_dict": {"module.<name>": tensor}}, on its BERT.

    checkpoint: a path or `hf-hub:OWNER/REPO/FILE` (published: hf-hub:StanfordAIMI/RRG_scorers/chexbert.pth on
    bert-base-uncased). bert_folder: folder or hub name of config and tokenizer; the weights are the checkpoint's.
    ValueError (one line) for what cannot be read, and for weights that are missing, unknown, misshapen or not finite.
    """
    with loading(f"chexbert: cannot load {bert_folder}", "give the BERT that the checkpoint sits on"):
        model = CheXbert(BertModel(AutoConfig.from_pretrained(bert_folder, trust_remote_code=False)))
        tokenizer = load_tokenizer(bert_folder)
        require_rows(tokenizer, model.bert.config.vocab_size, bert_folder)
    with loading(f"chexbert: cannot load {checkpoint}", "give a path or hf-hub:OWNER/REPO/chexbert.pth"):
        path = local_file(checkpoint)
        check_torch_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        state = {name.removeprefix("module."): value for name, value in state.items()}
        state.pop("bert.embeddings.position_ids", None)  # a constant that some transformers versions saved
        model.load_state_dict(state, strict=True)
        require_finite_tensors(model, checkpoint)
    return Labeller(pack_linears(model.to(device).eval().requires_grad_(False)), tokenizer)


class Labeller:
    """Labels texts in CHEXPERT_LABELS' order: `labeller(texts)` gives the positives, (n, 14) bool.

    As in the `f1chexbert` package, white space is normalised, a text cut at 512 tokens, and positive means positive or
    uncertain; but a text without a word is blank throughout. Each distinct text is labelled once and remembered.
    """

    def __init__(self, model: CheXbert, tokenizer):
        self.model, self.tokenizer, self.cache = model, tokenizer, {}
        tokenizer.model_max_length = min(512, model.bert.config.max_position_embeddings)

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.isin(self.classes(texts), (POSITIVE, UNCERTAIN))

    def classes(self, texts: list[str]) -> np.ndarray:
        """CheXbert's class of each label, (n, 14) int64: 0 blank, 1 positive, 2 negative, 3 uncertain."""
        rows = cached(self.cache, [" ".join(plain(text).split()) for text in texts], self.classify)
        return np.array(rows, dtype=np.int64).reshape(len(texts), 14)

    @torch.no_grad()
    def classify(self, texts: list[str]) -> list[list[int]]:
        """The 14 classes of each text, asked of the model; texts of like length share a batch."""
        device, found = self.model.linear_heads[0].weight.device, {"": [BLANK] * 14}
        ids = {text: self.tokenizer(text, truncation=True)["input_ids"] for text in texts if text}
        for chunk in of_like_length(list(ids), lambda text: len(ids[text]), device):
            batch = self.tokenizer.pad({"input_ids": [ids[text] for text in chunk]}, return_tensors="pt").to(device)
            classes = torch.stack([logits.argmax(dim=1) for logits in self.model(**batch)], dim=1)  # (n, 14)
            found.update(zip(chunk, classes.tolist(), strict=True))
        return [found[text] for text in texts]
