"""RadGraph through the `radgraph` package, on tiny random archives in its real on-disk layout."""

import json
import os
import shutil
import tarfile

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from test_running_weights import flip_a_weight

from benchmarks import radgraph_archive
from config import Config, ScorerConfig
from scorers import load
from scorers import radgraph_model as radgraph_package
from scorers.load import load_scorers
from scorers.radgraph_model import PackageRadGraph

torch.set_num_threads(1)
package = pytest.importorskip("radgraph.radgraph")
REPORTS = [
    "Small left pleural effusion. The heart is enlarged.", "No pleural effusion or pneumothorax is seen.",
    "Opacity in the left base may represent pneumonia, 5% (new).", "Lungs are clear.", "Effusion",
    "Heart size is normal.",
    "Small right effusion with opacity. Left base is clear. The heart is enlarged. " * 4,
]  # fmt: skip
WORDS = sorted({"a", "b"} | {word for text in REPORTS for word in text.lower().replace(".", " .").split()})


def write_archive(home, model_type: str) -> None:
    """A tiny archive, its weights wide enough for several labels and relations."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    radgraph_archive.write_archive(home, model_type, WORDS, sizes=sizes)


@pytest.fixture(scope="module", params=("radgraph", "radgraph-xl", "modern-radgraph-xl"))
def archive(request, tmp_path_factory):
    """(folder that holds the archive, model type)."""
    home = tmp_path_factory.mktemp("radgraph")
    write_archive(home, request.param)
    return home, request.param


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One archive of the type `radgraph`."""
    home = tmp_path_factory.mktemp("plain")
    write_archive(home, "radgraph")
    return home


@pytest.mark.parametrize("level", ("simple", "partial", "complete"))
def test_equals_the_package(archive, level):
    home, model_type = archive
    hyps, refs = REPORTS * 2, [*REPORTS[1:], REPORTS[0], *REPORTS]
    oracle = package.F1RadGraph(reward_level=level, model_type=model_type, model_cache_dir=str(home), cuda=-1)
    _, scores, ours, theirs = oracle(hyps=hyps, refs=refs)
    scorer = PackageRadGraph(model_type, str(home), level)
    assert scorer(hyps, refs) == scores and (scorer.annotations(hyps), scorer.annotations(refs)) == (ours, theirs)
    assert any(0 < score < 1 for score in scores) and 1 in scores
    entities = [entity for annotation in ours for entity in annotation["entities"].values()]
    assert len({entity["label"] for entity in entities}) > 1
    assert len({name for entity in entities for name, _ in entity["relations"]}) > 1


def test_real_reports_score_as_in_the_package(plain, real_reports):
    hyps, refs = real_reports[:10], real_reports[10:20]
    oracle = package.F1RadGraph(reward_level="partial", model_type="radgraph", model_cache_dir=str(plain), cuda=-1)
    scorer = PackageRadGraph("radgraph", str(plain))
    _, scores, ours, theirs = oracle(hyps=hyps, refs=refs)
    assert scorer(hyps, refs) == scores and scorer.annotations([*hyps, *refs]) == ours + theirs


def test_restored_methods_give_the_tokenizers_own_ids(archive):
    tokenizer = package.token_indexers.PretrainedTransformerMismatchedIndexer(str(archive[0] / "encoder"))._tokenizer
    text = "small left effusion ."
    assert tokenizer.encode_plus(text)["input_ids"] == tokenizer(text)["input_ids"]
    bare = tokenizer.encode_plus(text, add_special_tokens=False)["input_ids"]
    assert len(bare) == len(tokenizer(text)["input_ids"]) - 2
    assert tokenizer.build_inputs_with_special_tokens(bare) == tokenizer(text)["input_ids"]


def test_empty_texts_score_0_and_keep_their_place(plain):
    score = PackageRadGraph("radgraph", str(plain))
    hyps, refs = ["", REPORTS[0], " \n", "", REPORTS[0]], [REPORTS[0], "", REPORTS[0], "", REPORTS[0]]
    scores = score(hyps, refs)
    oracle = package.F1RadGraph(reward_level="partial", model_type="radgraph", model_cache_dir=str(plain), cuda=-1)
    assert scores == oracle(hyps=[text.strip() for text in hyps], refs=refs)[1] == [0, 0, 0, 0, 1]
    assert score.annotations(["", " \n"]) == [{"text": "", "entities": {}}] * 2 and score([], []) == []


def test_each_text_is_annotated_once_without_gradients(plain, monkeypatch):
    score, calls = PackageRadGraph("radgraph", str(plain)), []
    forward = score.model.forward

    def counted(texts):
        assert not torch.is_grad_enabled()
        calls.append(list(texts))
        return forward(texts)

    monkeypatch.setattr(score.model, "forward", counted)
    first = score(REPORTS[1:4], [REPORTS[0]] * 3)
    again = score([REPORTS[1], REPORTS[4]], [REPORTS[0]] * 2)
    assert calls == [[text] for text in (*REPORTS[1:4], REPORTS[0], REPORTS[4])] and again[0] == first[0]
    score.annotations(REPORTS[:1])[0]["entities"].clear()  # what a caller does to an annotation stays with the caller
    assert score([REPORTS[0]], [REPORTS[0]]) == [1]
    assert not any(p.requires_grad for p in score.model.parameters()) and not score.model.training


def test_a_text_that_cannot_be_annotated_scores_0_and_is_named(plain, monkeypatch, capsys):
    score = PackageRadGraph("radgraph", str(plain))
    forward = score.model.forward
    monkeypatch.setattr(score.model, "forward", lambda texts: {} if "Lungs" in texts[0] else forward(texts))
    assert score([REPORTS[0]] * 2, ["Lungs are clear.", REPORTS[0]]) == [0, 1]
    assert "could not annotate 'Lungs are clear.'" in capsys.readouterr().out


def test_an_endless_text_is_read_up_to_a_limit(plain, monkeypatch):
    monkeypatch.setattr(radgraph_package, "LONGEST", 6)
    score = PackageRadGraph("radgraph", str(plain))
    endless, cut = score.annotations(["Small left effusion. " * 5_000, "Small left effusion. Small left"])
    assert endless == cut


@pytest.mark.parametrize("module, value", [
    ("ner", {"regularizer": {"regexes": [[".*", {"type": "subprocess.Popen", "args": ["touch", "PLACE"]}]]}}),
    ("relation", {"spans_per_word": 0.5, "regularizer": {"regexes": [[".*", "subprocess.Popen"]]}}),
    ("coref", {"vocab": {"type": "os.system", "command": "touch PLACE"}}),
    ("events", {"trigger_spans_per_word": "a: 0.3"})])  # fmt: skip
def test_an_archive_that_names_code_is_refused(plain, tmp_path, module, value):
    shutil.copytree(plain, tmp_path / "copy")
    path = tmp_path / "copy" / "radgraph" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["modules"][module] = json.loads(json.dumps(value).replace("PLACE", str(tmp_path / "run")))
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="radgraph: .*model.modules holds .*only numbers are taken there") as caught:
        PackageRadGraph("radgraph", str(tmp_path / "copy"))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_an_encoder_with_code_or_without_a_tokenizer_and_weights_with_nan_are_refused(tmp_path):
    write_archive(tmp_path, "radgraph")
    encoder, weights = tmp_path / "encoder", tmp_path / "radgraph" / "weights.th"
    state, config = torch.load(weights, weights_only=True), json.loads((encoder / "config.json").read_text())

    def refused(match):
        with pytest.raises(ValueError, match=f"radgraph: cannot load .*{match}") as caught:
            PackageRadGraph("radgraph", str(tmp_path))
        assert "\n" not in str(caught.value)

    key = next(iter(state))
    torch.save(state | {key: state[key] * torch.nan}, weights)
    refused(f"{key} holds NaN")
    (encoder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Code"}}))
    refused("'auto_map'")
    (encoder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "vocab.txt"):
        (encoder / name).unlink(missing_ok=True)
    refused("no tokenizer.json")


def test_archive_from_the_hub(plain, hub, tmp_path, monkeypatch):
    """Fetched and unpacked where the package looks, once; nothing is left behind by an archive that is broken."""
    monkeypatch.setattr(package, "CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="cannot load .*unpack radgraph.tar.gz into it"):
        PackageRadGraph("radgraph")
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as tar:
        tar.add(plain / "radgraph", arcname=".")
    files = {"radgraph.tar.gz": tmp_path / "good.tar.gz", "radgraph-xl.tar.gz": tmp_path / "bad.tar.gz"}
    hub("StanfordAIMI/RRG_scorers", files)
    got = PackageRadGraph("radgraph").annotations(REPORTS)
    assert got == PackageRadGraph("radgraph", str(plain)).annotations(REPORTS)
    with pytest.raises(ValueError, match="cannot load .*radgraph-xl .ReadError"):
        PackageRadGraph("radgraph-xl")
    folders = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert folders == ["radgraph"]
    monkeypatch.setattr(radgraph_package, "unpack", None)  # not needed again
    PackageRadGraph("radgraph")


def test_what_cannot_be_loaded_is_one_line(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "copy")
    home = tmp_path / "copy"
    folder = home / "radgraph"
    weights, config = (folder / "weights.th").read_bytes(), (folder / "config.json").read_text()

    def refused(match, model_type="radgraph", where=home):
        with pytest.raises(ValueError, match=match) as caught:
            PackageRadGraph(model_type, str(where))
        assert "\n" not in str(caught.value) and str(caught.value).startswith("radgraph: ")

    refused(r"No such file.*radgraph-xl/config.json.*; unpack radgraph-xl.tar.gz", "radgraph-xl")
    refused("No such file.*config.json", where=tmp_path / "absent")
    (folder / "config.json").write_text(config.replace(str(plain / "encoder"), "owner/no-such-encoder"))
    refused("cannot load .*; config.json's model_name, the encoder, is a folder or a hub name")
    for text in ("{", "{}"):
        (folder / "config.json").write_text(text)
        refused("cannot load")
    (folder / "config.json").write_text(config)
    state = torch.load(folder / "weights.th", weights_only=True)
    key = next(key for key in state if "_ner_scorers" in key)
    torch.save({name: value for name, value in state.items() if name != key}, folder / "weights.th")
    refused(f"Missing key.*{key}")
    for broken in (weights[: len(weights) // 2], b"not weights", b""):
        (folder / "weights.th").write_bytes(broken)
        refused("weights.th: (broken or cut off|empty)")
    (folder / "weights.th").unlink()
    refused("no weights.th")
    (folder / "weights.th").write_bytes(weights)
    (folder / "vocabulary" / "non_padded_namespaces.txt").unlink()
    refused("No such file.*non_padded_namespaces.txt")


@pytest.mark.parametrize("change", [
    lambda config: config["model"]["embedder"]["token_embedders"]["bert"].update(max_length=0),
    lambda config: config["dataset_reader"].update(max_span_width=0),
    lambda config: config["model"].update(loss_weights={"ner": {"a": 1}})])  # fmt: skip
def test_settings_that_no_text_can_be_annotated_with_are_one_line_at_load(plain, tmp_path, change):
    shutil.copytree(plain / "radgraph", tmp_path / "radgraph")
    config = json.loads((plain / "radgraph" / "config.json").read_text())
    change(config)
    (tmp_path / "radgraph" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="^radgraph: cannot load .*(ZeroDivision|Index|Type)Error"):
        PackageRadGraph("radgraph", str(tmp_path))


def test_changed_bytes_of_the_weights_are_refused(plain, tmp_path):
    shutil.copytree(plain / "radgraph", tmp_path / "radgraph")
    flip_a_weight(tmp_path / "radgraph" / "weights.th")
    with pytest.raises(ValueError, match="radgraph: cannot load .*weights.th: broken or cut off"):
        PackageRadGraph("radgraph", str(tmp_path))


def test_load_scorers_takes_the_package(plain, monkeypatch):
    monkeypatch.setattr(load, "load_chexbert", lambda *args: None)
    monkeypatch.setattr(load, "load_bertscore", lambda *args: args)
    cfg = Config(scorers=ScorerConfig(radgraph="radgraph", radgraph_dir=str(plain), radgraph_level="complete",
                                      bertscore="b", bertscore_baseline="package"))  # fmt: skip
    scorers = load_scorers(cfg, with_expert=False)
    expected = PackageRadGraph("radgraph", str(plain), "complete")(REPORTS, REPORTS[::-1])
    assert scorers.radgraph(REPORTS, REPORTS[::-1]) == expected and scorers.bertscore == ("b", 2, "cpu", "package")
    cfg.scorers.radgraph = "rules"
    assert load_scorers(cfg, with_expert=False).radgraph(["Effusion."], ["Effusion."]) == [1]
