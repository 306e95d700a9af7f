"""An archive of the `radgraph` package in its on-disk layout, of any size and with random weights.

The released archives cannot be made from nothing; this one has the same files, so that the package loads it by itself:

    home/encoder/                    config and tokenizer of a BERT or ModernBERT (its weights are in weights.th)
    home/<model type>/config.json    the settings of the package's reader and model
    home/<model type>/weights.th
    home/<model type>/vocabulary/    the labels of entities and relations
"""

import json
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertTokenizer, ModernBertConfig, PreTrainedTokenizerFast

from scorers.radgraph_model import restore_tokenizer_methods

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ENTITIES = ["", *(f"Observation::{s}" for s in ("definitely present", "definitely absent", "uncertain")),
            "Anatomy::definitely present"]  # fmt: skip
RELATIONS = ["modify", "located_at", "suggestive_of"]


def write_encoder(folder: Path, modern: bool, words: list[str], sizes: dict) -> None:
    """Config and tokenizer; ModernBERT reads bytes, BERT the given words."""
    folder.mkdir()
    if not modern:
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
        BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        BertConfig(vocab_size=len(SPECIAL) + len(words), initializer_range=0.5, **sizes).save_pretrained(folder)
        return
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                            unk_token="[UNK]", mask_token="[MASK]").save_pretrained(folder)  # fmt: skip
    ModernBertConfig(vocab_size=tokenizer.get_vocab_size(), pad_token_id=0, cls_token_id=2, sep_token_id=3,
                     bos_token_id=2, eos_token_id=3, **sizes).save_pretrained(folder)  # fmt: skip


def write_archive(
    home: Path, model_type: str, words: list[str], *, sizes: dict, max_length: int = 24, feedforward: int = 16,
    span: int = 3, std: float = 1.0, rarely: float = 0.0,
) -> None:  # fmt: skip
    """Write the archive into the empty folder `home`.

    sizes: the encoder's hidden_size and so on. span: words of an entity, at most. std: of every weight. rarely: what is
    taken off each label's score, so that not every span of random weights is an entity.
    """
    from radgraph import radgraph as package

    write_encoder(home / "encoder", model_type.startswith("modern"), words, sizes)
    bert = {"type": "pretrained_transformer_mismatched", "model_name": str(home / "encoder"), "max_length": max_length}
    modules = {
        "coref": {"spans_per_word": 0.3, "max_antecedents": 100, "coref_prop": 0},
        "events": {"trigger_spans_per_word": 0.3, "argument_spans_per_word": 0.8,
                   "loss_weights": {"trigger": 0.2, "arguments": 1.0}},
        "ner": {}, "relation": {"spans_per_word": 0.5}}  # fmt: skip
    model = {
        "type": "dygie", "embedder": {"token_embedders": {"bert": bert}}, "initializer": {}, "module_initializer": {},
        "modules": modules, "feature_size": 4, "max_span_width": span, "target_task": "relation",
        "feedforward_params": {"num_layers": 2, "hidden_dims": feedforward, "dropout": 0.4},
        "loss_weights": {"ner": 0.2, "relation": 1.0, "coref": 0.0, "events": 0.0}}  # fmt: skip
    reader = {"type": "dygie", "token_indexers": {"bert": bert}, "max_span_width": span}
    folder = home / model_type
    (folder / "vocabulary").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"dataset_reader": reader, "model": model}))
    (folder / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n*tags")
    for what, labels in (("ner", ENTITIES), ("relation", RELATIONS)):
        (folder / "vocabulary" / f"{model_type}__{what}_labels.txt").write_text("\n".join(labels))
    torch.save({}, folder / "weights.th")
    restore_tokenizer_methods()
    # the package builds its model, random weights are then saved
    with mock.patch.object(package.dygie.DyGIE, "load_state_dict", lambda *args, **kwargs: None):
        built = package.RadGraph(model_type=model_type, model_cache_dir=str(home), cuda=-1).model
    torch.manual_seed(0)
    for name, parameter in built.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.0 if name.endswith("bias") else std)
        if "scorers" in name and name.endswith("bias"):
            parameter.data -= rarely
    torch.save(built.state_dict(), folder / "weights.th")
