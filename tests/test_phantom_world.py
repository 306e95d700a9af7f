"""The phantom world: what it draws, what it writes, how wrong its references are, and the files of a data set."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from config import Config, merge
from evidence.reader import truth_counts
from phantom import world as phantom
from phantom.config import AssetsConfig, PhantomConfig, Recipe
from phantom.findings import LABELS, finding_of
from phantom.image import contact_sheet, encode_mask, render
from phantom.text import AUTHORS
from phantom.world import sample_findings

CFG = PhantomConfig()
TINY = PhantomConfig(expert=3, base=5, sft=4, train=3, val=2, test=4)


def study(seed, noisy=True, cfg=CFG):
    """(findings, report, stated labels) of one study."""
    rng = np.random.default_rng([11, seed])
    findings = sample_findings(rng, cfg)
    return findings, *phantom.write_report(findings, rng, cfg, noisy)


def decode_mask(rle):
    """(H, W) bool of COCO's uncompressed run lengths, run by run."""
    values = [run % 2 == 1 for run, length in enumerate(rle["counts"]) for _ in range(length)]
    return np.array(values).reshape(rle["size"], order="F")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom")
    phantom.build(Recipe(TINY, AssetsConfig(), 0), path)
    return path


def test_a_zone_holds_one_finding_and_none_hides_behind_fluid():
    both = 0
    for i in range(2000):
        found = sample_findings(np.random.default_rng([2, i]), CFG)
        for side in ("left", "right"):
            zones = [f.site for f in found if f.side == side and f.name in ("consolidation", "lesion")]
            zones += ["lower" for f in found if f.side == side and f.name == "effusion" and f.level]
            assert len(zones) == len({*zones})
            both += len(zones) > 1
    assert both > 20


def test_labels_are_the_fifteen():
    assert len(LABELS) == 15 and LABELS[:4] == ("cardiomegaly", "edema", "device", "effusion_left")
    for label in LABELS:
        assert finding_of(label, np.random.default_rng(0)).label == label


def test_sampled_findings_keep_the_configured_rates():
    studies = [{f.label for f in sample_findings(np.random.default_rng([1, i]), CFG)} for i in range(4000)]
    sizes = np.array([len(labels) for labels in studies])
    assert abs((sizes == 0).mean() - CFG.normal) < 0.025 and sizes.max() <= 4
    assert all(sum(label in labels for labels in studies) > 200 for label in LABELS)
    large = [labels for labels in studies if "cardiomegaly" in labels]
    small = [labels for labels in studies if labels and "cardiomegaly" not in labels]
    for label in ("edema", "effusion_left"):
        assert np.mean([label in x for x in large]) > 1.1 * np.mean([label in x for x in small]), label
    assert np.mean(["edema" in labels for labels in large]) < 0.35


def test_the_images_left_half_is_the_patients_right():
    for label in LABELS[3:]:
        for seed in range(8):
            rng = np.random.default_rng([2, seed])
            _, masks = render([finding_of(label, rng)], rng, CFG.image_size)
            columns = np.nonzero(masks[label])[1]
            assert list(masks) == [label]
            assert (columns.mean() > 32) == label.endswith("left"), (label, seed)
            assert np.mean((columns >= 32) == label.endswith("left")) > 0.95, (label, seed)


def test_a_finding_changes_the_image_where_its_mask_is():
    for label in LABELS:
        rng = np.random.default_rng(5)
        finding = finding_of(label, rng)
        with_it, masks = render([finding], np.random.default_rng(7), CFG.image_size)
        without, _ = render([], np.random.default_rng(7), CFG.image_size)
        change = np.abs(with_it.astype(float) - without)
        assert with_it.shape == (64, 64) and with_it.dtype == np.uint8 and masks[label].dtype == bool
        assert change[masks[label]].mean() > 12, label


def test_noise_of_references_is_as_configured():
    rates = phantom.noise_rates([{"labels": [f.label for f in fs], "stated": stated}
                                 for fs, _, stated in map(study, range(4000))])  # fmt: skip
    assert 0.23 < rates["hallucinated"] < 0.29 and 0.06 < rates["omitted"] < 0.11
    assert abs(rates["prior_edema_cardiomegaly"] - CFG.prior_edema_cardiomegaly) < 0.06
    assert abs(rates["prior_atelectasis_effusion"] - CFG.prior_atelectasis_effusion) < 0.08
    mild = dataclasses.replace(CFG, omit=0.0, omit_mild=1.0)
    for findings, _, stated in (study(i, cfg=mild) for i in range(100)):
        assert not any(f.severity in ("mild", "small") and f.label in stated for f in findings)


def test_clean_reports_are_complete_and_true():
    for findings, report, stated in (study(i, noisy=False) for i in range(200)):
        assert sorted(stated) == sorted(f.label for f in findings)
        assert report.count("FINDINGS:") == report.count("IMPRESSION:") == 1 and report.startswith("FINDINGS: ")
    assert study(3) == study(3)


def test_reports_are_short_and_authors_differ():
    lengths = [len(report.split()) for _, report, _ in map(study, range(500))]
    assert 30 < np.mean(lengths) < 50 and np.max(lengths) < 100
    rng = np.random.default_rng(0)
    findings = [finding_of("effusion_left", rng), finding_of("edema", rng)]
    texts = {a: {phantom.write_report(findings, np.random.default_rng(i), CFG, False, a)[0] for i in range(30)}
             for a in range(len(AUTHORS))}  # fmt: skip
    assert all(len(group) > 20 for group in texts.values()) and not texts[0] & texts[1]


def test_captions_mix_and_carry_the_prior_at_the_configured_rate():
    def wrong(cfg):
        count = 0
        for i in range(1500):
            rng = np.random.default_rng([3, i])
            findings = sample_findings(rng, cfg)
            text, stated = phantom.write_caption(findings, rng, cfg)
            assert text.endswith(".")
            count += bool(set(stated) - {f.label for f in findings})
        return count

    assert wrong(dataclasses.replace(CFG, base_prior=0.0)) == 0
    assert 0.25 < wrong(CFG) / wrong(dataclasses.replace(CFG, base_prior=1.0)) < 0.55


def test_run_lengths_round_trip_and_go_down_the_columns():
    mask = np.zeros((3, 2), bool)
    mask[1:, 0] = True
    assert encode_mask(mask) == {"size": [3, 2], "counts": [1, 2, 3]}
    assert encode_mask(np.ones((2, 2), bool))["counts"] == [0, 4]
    for seed in range(50):
        mask = np.random.default_rng(seed).random((7, 5)) < 0.5
        assert (decode_mask(json.loads(json.dumps(encode_mask(mask)))) == mask).all()


def test_run_lengths_are_cocos():
    mask_api = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    mask = np.random.default_rng(0).random((64, 48)) < 0.5
    ours = mask_api.frPyObjects(encode_mask(mask), 64, 48)
    assert ours == mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_data_set_on_disk(folder):
    annotation = json.loads((folder / "annotation.json").read_text())
    truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
    assert {split: len(rows) for split, rows in annotation.items()} == {s: getattr(TINY, s) for s in phantom.SPLITS}
    rows = [row for split in annotation.values() for row in split]
    assert len({row["id"] for row in rows}) == len(rows) == 21 and [r["id"] for r in rows] == [t["id"] for t in truth]
    for row, fact in zip(rows, truth, strict=True):
        image = Image.open(folder / "images" / row["image_path"][0])
        assert image.size == (64, 64) and image.mode == "L" and row["image_path"] == [f"{row['id']}/0.png"]
        assert fact["split"] == row["split"] and fact["labels"] == [x for x in LABELS if x in fact["labels"]]
        assert sorted(f["label"] for f in fact["findings"]) == sorted(fact["labels"])
        assert all(decode_mask(f["mask"]).any() for f in fact["findings"])
        assert row["report"].startswith("FINDINGS:") or row["split"] == "base"
        if row["split"] == "expert":
            assert fact["stated"] == fact["labels"]
    assert len({(folder / "images" / r["image_path"][0]).read_bytes() for r in rows}) == len(rows)


def test_same_seed_same_bytes(folder, tmp_path):
    for seed, name in ((0, "again"), (1, "other")):
        phantom.build(Recipe(TINY, AssetsConfig(), seed), tmp_path / name)
    for file in [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert (folder / "truth.jsonl").read_bytes() != (tmp_path / "other" / "truth.jsonl").read_bytes()


def test_a_study_does_not_depend_on_the_split_sizes(folder):
    image, row, _ = phantom.make_study(CFG, 0, "train", 2)
    assert row in json.loads((folder / "annotation.json").read_text())["train"]
    assert (np.asarray(Image.open(folder / "images" / row["image_path"][0])) == image).all()


def test_bad_settings_are_named():
    for field, value, why in (("omit", 1.5, "less than or equal to 1"), ("omit", float("nan"), "finite|less than"),
                              ("val", -1, "greater than or equal to 0"), ("image_size", 8, "equal to 32"),
                              ("image_size", 10**6, "equal to 2048"), ("train", 10**12, "less than"),
                              ("expert", 1, "equal to 2"), ("sft", True, "integer"), ("hedge", "0.1", "number")):
        with pytest.raises(ValueError, match=rf"phantom\.{field}.*({why})"):
            merge(Config(), {"phantom": {field: value}})
    with pytest.raises(ValueError, match=r"assets\.base_steps.*greater than or equal to 1"):  # as in all of them
        merge(Config(), {"assets": {"base_steps": 0}})


@pytest.mark.parametrize("rate", [0.0, 1.0])  # no finding ever, or always more than four
def test_a_world_without_abnormal_studies_is_refused(rate, tmp_path):
    rates = {name: rate for name in vars(CFG) if name.partition("_")[0] in {x.partition("_")[0] for x in LABELS}}
    world = dataclasses.replace(TINY, **rates)
    with pytest.raises(ValueError, match="1 to 4 findings never came about"):
        phantom.build(Recipe(world, AssetsConfig(), 0), tmp_path)
    phantom.build(Recipe(dataclasses.replace(world, normal=1.0), AssetsConfig(), 0), tmp_path)


def test_contact_sheet(folder, tmp_path):
    contact_sheet([phantom.make_study(TINY, 0, "test", i) for i in range(4)], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == (folder / "contact_sheet.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert sheet.shape[1] > 1000
    for column in np.split(sheet[:, : sheet.shape[1] // 4 * 4], 4, axis=1):
        assert (column < 100).mean() > 0.1  # each has a film, which is dark


def test_clean_references_state_what_each_training_image_shows_and_change_nothing_else(folder):
    clean = folder.with_name("phantom_clean")
    clean.mkdir()
    (folder.with_name("data")).symlink_to(folder)
    phantom.build_clean(Recipe(TINY, AssetsConfig(), 0), clean)
    old, new = (json.loads((path / "annotation.json").read_text()) for path in (folder, clean))
    assert {s for s in new if new[s] != old[s]} == {"train"}
    truth = {row["id"]: row["labels"] for row in map(json.loads, (clean / "truth.jsonl").read_text().splitlines())}
    for before, after in zip(old["train"], new["train"], strict=True):
        assert before | {"report": ""} == after | {"report": ""}
        counts = truth_counts(after["report"], truth[after["id"]])
        assert counts["hallucinated"] == counts["omitted"] == 0
    assert (clean / "images" / new["train"][0]["image_path"][0]).is_file()
