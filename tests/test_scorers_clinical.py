"""The frozen text scorers on tiny random models in their real on-disk layouts."""

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

from benchmarks import reward_pass
from rewards import label_f1
from scorers import clinical, radgraph_rules

torch.set_num_threads(1)
WORDS = ("no there is a left right small large pleural effusion pneumothorax edema heart size normal lungs are clear "
         "consolidation in the lower lobe pacemaker seen . , :").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT folder (config, tokenizer, weights) with a CheXbert checkpoint in it."""
    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=64, initializer_range=0.5))  # fmt: skip
    bert.save_pretrained(path)
    model = clinical.CheXbert(bert)
    torch.nn.init.normal_(model.linear_heads[13].weight)
    clinical.save_chexbert(model, path / "chexbert.pth")
    return path


def sentences(n, seed=0, most=30):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, most))) for _ in range(n)]


def edit(folder, tmp_path, change):
    """A copy of the folder's checkpoint, changed."""
    data = torch.load(folder / "chexbert.pth", weights_only=True)
    torch.save(change(data), tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_label_f1_by_hand():
    rows = {"none": [], "a": [1], "ab": [1, 2], "bc": [2, 3], "normal": [13]}
    rows = {name: [i in on for i in range(14)] for name, on in rows.items()}
    cases = [("none", "none", 1), ("a", "none", 0), ("none", "a", 0), ("a", "a", 1), ("a", "ab", 2 / 3),
             ("ab", "bc", 0.5), ("normal", "normal", 1), ("normal", "a", 0)]  # fmt: skip
    got = label_f1(np.array([rows[a] for a, _, _ in cases]), np.array([rows[b] for _, b, _ in cases]))
    assert got == pytest.approx([value for *_, value in cases])
    assert label_f1(np.zeros((0, 14), bool), np.zeros((0, 14), bool)) == []


def test_checkpoint_layout_and_round_trip(folder, tmp_path):
    state = torch.load(folder / "chexbert.pth", weights_only=True)["model_state_dict"]
    assert "module.bert.embeddings.word_embeddings.weight" in state and "module.linear_heads.13.bias" in state
    labeller = clinical.load_chexbert(folder / "chexbert.pth", folder)
    clinical.save_chexbert(labeller.model, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model_state_dict"]
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_bad_checkpoints_are_one_line(folder, tmp_path):
    key = "module.linear_heads.3.weight"

    def drop(data):
        del data["model_state_dict"][key]
        return data

    def rename(data):
        data["model_state_dict"]["module.extra"] = torch.zeros(1)
        return data

    def shrink(data):
        data["model_state_dict"][key] = torch.zeros(4, 8)
        return data

    cases = [
        (drop, "lacks key 'linear_heads.3.weight'"), (rename, "unknown key 'extra'"),
        (shrink, r"\(4, 8\).*\(4, 32\)"), (lambda data: {"state_dict": data}, "no 'model_state_dict'"),
        (lambda data: {"model_state_dict": [1]}, "no 'model_state_dict'"),
        (lambda data: data | {"model": os.system}, "no readable torch checkpoint"),  # a pickle that runs code
    ]  # fmt: skip
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            clinical.load_chexbert(edit(folder, tmp_path, change), folder)
        assert "\n" not in str(caught.value)
    whole = (folder / "chexbert.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("half.pth", "text.pth", "empty.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name) as caught:
            clinical.load_chexbert(tmp_path / name, folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no BERT in"):
        clinical.load_chexbert(folder / "chexbert.pth", tmp_path)


def test_checkpoint_and_bert_by_hub_name(folder, hub):
    hub("owner/scorers", {"chexbert.pth": folder / "chexbert.pth"})
    hub("owner/bert", {path.name: path for path in folder.glob("*.json")})
    got = clinical.load_chexbert("hf-hub:owner/scorers/chexbert.pth", "owner/bert").classes(sentences(20))
    assert (got == clinical.load_chexbert(folder / "chexbert.pth", folder).classes(sentences(20))).all()
    cases = [("hf-hub:owner/scorers/other.pth", "cannot fetch"), ("hf-hub:owner/none/f.pth", "cannot fetch"),
             ("hf-hub:owner/scorers", "names no file")]  # fmt: skip
    for name, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            clinical.load_chexbert(name, folder)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_batches_stay_within_a_cpus_cache():
    lengths = [100, 300, 50, 200, 900]
    batches = list(clinical.of_like_length(lengths, lambda n: n, "cpu"))  # 512 // the longest of the rest
    assert batches == [[900], [300], [100, 200], [50]]
    assert list(clinical.of_like_length(lengths, lambda n: n, "cuda")) == [sorted(lengths)]
    assert list(clinical.of_like_length([0, 0], lambda n: n, "cpu")) == [[0, 0]] and lengths[0] == 100


@pytest.mark.parametrize("part", reward_pass.PARTS)
def test_both_sides_of_the_reward_benchmark_agree(part):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    package, ours, references, passes = reward_pass.both_sides(part, config, 2, "cpu")
    assert len(passes) == 2 and not set(passes[0]) & set(passes[1]) and len(passes[0]) == len(references) == 16
    for candidates in passes:
        assert ours(candidates, references) == pytest.approx(package(candidates, references), abs=1e-4)


def package_labeller(folder):
    """f1chexbert's own labelling on the folder's checkpoint; its constructor downloads, so it is filled in by hand."""
    package = pytest.importorskip("f1chexbert.f1chexbert")
    oracle = package.F1CheXbert.__new__(package.F1CheXbert)
    torch.nn.Module.__init__(oracle)
    oracle.device, oracle.tokenizer = "cpu", AutoTokenizer.from_pretrained(folder)
    encode = oracle.tokenizer.convert_tokens_to_ids
    oracle.tokenizer.encode_plus = lambda tokens: {"input_ids": [2, *encode(tokens), 3]}  # gone from transformers 5
    oracle.model = package.bert_labeler(pretrain_path=str(folder)).eval()
    oracle.model.load_state_dict(clinical.read_checkpoint(folder / "chexbert.pth"), strict=True)
    return oracle.get_label


def test_labels_equal_the_package(folder):
    label = package_labeller(folder)
    texts = [*sentences(45), "  small\n\n left \t effusion ", "x", *sentences(3, seed=1, most=1500)]
    assert max(len(text.split()) for text in texts) > 512
    expected = [label(text) for text in texts]
    classes = [[{"": 0, 1: 1, 0: 2, -1: 3}[v] for v in label(text, mode="classification")] for text in texts]
    labeller = clinical.load_chexbert(folder / "chexbert.pth", folder)
    assert labeller(texts).astype(int).tolist() == expected
    assert labeller.classes(texts).tolist() == classes
    assert {0, 1, 2, 3} <= set(np.unique(classes)) and len({tuple(row) for row in expected}) > 5


def test_labels_of_real_reports_equal_the_package(folder, real_reports):
    label, labels = package_labeller(folder), clinical.load_chexbert(folder / "chexbert.pth", folder)(real_reports)
    assert labels.astype(int).tolist() == [label(text) for text in real_reports]


def test_cache_and_duplicates_change_nothing(folder, monkeypatch):
    texts = sentences(80)
    fresh = clinical.load_chexbert(folder / "chexbert.pth", folder)
    alone = np.concatenate([clinical.load_chexbert(folder / "chexbert.pth", folder)([text]) for text in texts[:10]])
    assert (fresh([*texts, *texts[:10]])[80:] == alone).all()
    calls = []
    monkeypatch.setattr(fresh.model, "forward", lambda *a: calls.append(a))
    assert (fresh(texts[:10] + texts[:10])[:10] == alone).all() and not calls
    assert fresh([]).shape == (0, 14)


def test_empty_text_is_blank(folder):
    labeller = clinical.load_chexbert(folder / "chexbert.pth", folder)
    assert not labeller.classes(["", " \n"]).any() and labeller(["clear"]).shape == (1, 14)


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(clinical, "CACHED_TEXTS", 3)
    cache, seen = clinical.OrderedDict(), []
    for text in ("a", "b", "a", "c", "d", "a", "b"):
        clinical.cached(cache, [text], lambda new: [seen.append(t) or t.upper() for t in new])
    assert list(cache) == ["d", "a", "b"] and seen == ["a", "b", "c", "d", "b"]  # "a" was used, so "b" had to go
    assert clinical.cached(cache, ["x", "y", "z", "w", "x"], lambda new: [t.upper() for t in new]) == list("XYZWX")


READINGS = [  # (text, word, certainty)
    ("There is a small left pleural effusion.", "effusion", "definitely present"),
    ("No pleural effusion or pneumothorax.", "pneumothorax", "definitely absent"),
    ("No focal consolidation, effusion, or pneumothorax is seen.", "pneumothorax", "definitely absent"),
    ("No pneumothorax, small effusion on the left.", "effusion", "definitely present"),
    ("No pneumothorax, but the heart is enlarged.", "enlarged", "definitely present"),
    ("Small pneumothorax without effusion.", "pneumothorax", "definitely present"),
    ("Small pneumothorax without effusion.", "effusion", "definitely absent"),
    ("Lungs are clear of consolidation.", "clear", "definitely present"),
    ("Lungs are clear of consolidation.", "consolidation", "definitely absent"),
    ("Pleural effusion is not seen.", "effusion", "definitely absent"),
    ("The effusion has resolved.", "effusion", "definitely absent"),
    ("No change in the left effusion.", "effusion", "definitely present"),
    ("The heart is not enlarged.", "enlarged", "definitely absent"),
    ("Pneumothorax cannot be excluded.", "pneumothorax", "uncertain"),
    ("We cannot exclude a pneumothorax.", "pneumothorax", "uncertain"),
    ("Possible left effusion, right lower lobe consolidation.", "effusion", "uncertain"),
    ("Possible left effusion, right lower lobe consolidation.", "consolidation", "definitely present"),
    ("Opacity may represent pneumonia or atelectasis.", "atelectasis", "uncertain"),
    ("Opacity may represent pneumonia or atelectasis.", "opacity", "definitely present"),
    ("No opacity to suggest pneumonia.", "pneumonia", "definitely absent"),
    ("No effusion, possible pneumonia.", "pneumonia", "uncertain"),
    ("Findings are consistent with severe edema.", "edema", "definitely present"),
    ("No effusion. Cardiomegaly.", "cardiomegaly", "definitely present"),
]  # fmt: skip


@pytest.mark.parametrize("text, word, certainty", READINGS)
def test_negation_and_uncertainty(text, word, certainty):
    labels = [e["label"] for e in radgraph_rules.annotate(text)["entities"].values() if e["tokens"] == word]
    assert labels == [f"Observation::{certainty}"]


def test_annotation_layout_and_relations():
    annotation = radgraph_rules.annotate("FINDINGS: Small left pleural effusion. Opacity in the right lower lobe.")
    entities, words = annotation["entities"], annotation["text"].split()
    assert list(entities) == [str(i + 1) for i in range(len(entities))]
    assert all(words[e["start_ix"]] == e["tokens"] and e["end_ix"] == e["start_ix"] for e in entities.values())
    named = {e["tokens"]: [(kind, entities[i]["tokens"]) for kind, i in e["relations"]] for e in entities.values()}
    assert named == {
        "small": [("modify", "effusion")], "left": [("modify", "pleural")], "pleural": [], "effusion":
        [("located_at", "pleural")], "opacity": [("located_at", "lobe")], "right": [("modify", "lobe")],
        "lower": [("modify", "lobe")], "lobe": []}  # fmt: skip
    assert entities["2"]["label"] == "Anatomy::definitely present" and "findings" not in named
    suggested = radgraph_rules.annotate("Consolidation suggesting pneumonia.")["entities"]
    assert suggested["1"]["relations"] == [["suggestive_of", "2"]]


def test_radgraph_score_sees_side_and_negation():
    score = clinical.RuleRadGraph()
    reference = "There is a small left pleural effusion. The lungs are clear."
    flipped, denied = reference.replace("left", "right"), reference.replace("There is a small", "No")
    worse = [flipped, denied, "The lungs are clear.", ""]
    mean, scores, hyps, refs = score(hyps=[reference, *worse, ""], refs=[reference] * 5 + [""])
    assert scores[0] == 1 and all(0 < value < 1 for value in scores[1:4]) and scores[4:] == [0, 1]
    assert mean == pytest.approx(sum(scores) / 6) and len(hyps) == len(refs) == 6
    with pytest.raises(ValueError, match="none of"):
        clinical.RuleRadGraph("all")


def test_radgraph_f1_equals_the_package():
    rewards = pytest.importorskip("radgraph.rewards")
    texts = ["Small left effusion. Heart is enlarged.", "No pleural effusion or pneumothorax. Heart is enlarged.",
             "Opacity in the left base may represent pneumonia.", "Left base opacity. Right pacemaker. Lungs clear.",
             "Left effusion and right effusion. No effusion at the base."]  # fmt: skip
    for level in ("simple", "partial", "complete"):
        for a in map(radgraph_rules.annotate, texts):
            for b in map(radgraph_rules.annotate, texts):
                assert radgraph_rules.radgraph_f1(a, b, level) == pytest.approx(rewards.compute_reward(a, b, level))


def test_bertscore(folder, capsys):
    score = clinical.load_bertscore(folder, 1)
    texts = sentences(12)
    assert score(texts, texts) == pytest.approx([1.0] * 12, abs=1e-5)
    got = score(["", texts[0], " ", texts[0], texts[1], texts[0]], [texts[0], "", "", texts[2], texts[2], texts[2]])
    assert got[:3] == [0, 0, 0] and 0 < got[3] < 1 and got[3] == got[5] != got[4]
    assert score([], []) == []
    assert score.truncated == 0
    long = sentences(1, seed=3, most=30)[0] + " left" * 600
    assert score([long], [long]) == pytest.approx([1.0], abs=1e-5) and score.truncated == 1
    assert score([long], [long + " pneumothorax"]) == pytest.approx([1.0], abs=1e-5)  # behind the cut
    assert score.truncated == 3 and capsys.readouterr().out.count("longer than 512 tokens") == 1


def test_bertscore_equals_the_package(folder):
    from bert_score import BERTScorer

    ours, theirs = sentences(70, seed=4), sentences(70, seed=5)
    scorer = BERTScorer(model_type=str(folder), num_layers=2, device="cpu")
    scorer._tokenizer.model_max_length = 512
    expected = scorer.score(ours, theirs)[2].clamp(0, 1).tolist()
    assert clinical.load_bertscore(folder, 2)(ours, theirs) == pytest.approx(expected, abs=1e-5)


def baseline_file(path, rows):
    path.write_text("LAYER,P,R,F\n" + "".join(f"{layer},.1,.2,{f}\n" for layer, f in enumerate(rows)))
    return str(path)


def test_bertscore_rescaled(folder, tmp_path):
    """(F - b) / (1 - b) as the package does it; what falls below 0 is 0; an empty text stays 0."""
    from bert_score import BERTScorer

    ours, theirs = sentences(40, seed=6), sentences(40, seed=7)
    plain = clinical.load_bertscore(folder, 2)(ours, theirs)
    middle = float(np.median(plain))
    path = baseline_file(tmp_path / "b.tsv", [0, 0.5, middle])
    got = clinical.load_bertscore(folder, 2, baseline=path)([*ours, "", "left"], [*theirs, "left", "left"])
    package = BERTScorer(model_type=str(folder), num_layers=2, device="cpu", lang="en", rescale_with_baseline=True,
                         baseline_path=path)  # fmt: skip
    package._tokenizer.model_max_length = 512
    expected = package.score(ours, theirs)[2]
    assert got == pytest.approx([*expected.clamp(0, 1).tolist(), 0, 1], abs=1e-5)
    assert (expected < -0.01).any() and (expected > 0.01).any()
    assert got[:40] == pytest.approx([max(0, (f - middle) / (1 - middle)) for f in plain], abs=1e-5)


def test_bertscore_baselines_of_the_package(folder, tmp_path):
    assert clinical.baseline_f1("roberta-large", 17, "package") == pytest.approx(0.8315, abs=1e-3)
    assert clinical.baseline_f1("microsoft/deberta-base", 9, "package") == pytest.approx(0.62694, abs=1e-5)
    (tmp_path / "text.tsv").write_text("LAYER,P,R,F\n2,a,b,c\n")
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    cases = [("package", "no baseline file"), (str(tmp_path / "absent.tsv"), "no baseline file"),
             (baseline_file(tmp_path / "short.tsv", [0, 0.5]), "no column or layer 2"),
             (str(tmp_path / "text.tsv"), "not LAYER,P,R,F"), (str(tmp_path / "other.tsv"), "no column .* 'LAYER'"),
             (baseline_file(tmp_path / "one.tsv", [0, 0, 1]), "must be below 1")]  # fmt: skip
    for baseline, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            clinical.load_bertscore(folder, 2, baseline=baseline)
        assert "\n" not in str(caught.value) and "bertscore:" in str(caught.value)


def test_bertscore_loads_its_encoder_once(folder, monkeypatch):
    import bert_score.scorer

    calls, get_model = [], bert_score.scorer.get_model
    monkeypatch.setattr(bert_score.scorer, "get_model", lambda *a: calls.append(a) or get_model(*a))
    score = clinical.load_bertscore(folder, 2)
    score(["left"], ["right"]), score(["left"], ["right"])
    assert len(calls) == 1


def test_bertscore_bad_folder_is_one_line(folder, tmp_path):
    for path, layer in ((folder, 9), (tmp_path, 1)):
        with pytest.raises(ValueError, match="bertscore: cannot load") as caught:
            clinical.load_bertscore(path, layer)
        assert "\n" not in str(caught.value)
