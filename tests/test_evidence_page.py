"""The page of a run: what stands in it, what it leaves out, and that it runs nothing that a report says."""

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from config import Config, to_dict
from data import load_studies
from evidence import page
from evidence.page import Stage, explain, pick, unusual
from phantom.assets import resolve
from phantom.image import encode_mask, outline

PARTS = {"bleu4": 0.2, "rouge_l": 0.4, "bertscore": 0.6, "similarity": 0.5, "visual": 0.75, "format": 1.0}


def candidate(reward: float, text: str = "<report> Left effusion. </report>", **parts) -> dict:
    return {"text": text, "reward": reward} | PARTS | parts


def stage_of(cfg: Config, **fields) -> Stage:
    log = pd.DataFrame({"k": []}).set_index("k")
    return Stage(**{"name": "stage2", "title": "VALOR", "log": log, "samples": [], "done": False} | fields, cfg=cfg)


METRICS = [{"k": k, "kl": 0.1 * k, "reward/total": 1.0, "length": 9.0, "format_rate": 1.0} for k in (1, 2, 3)]


def write_run(run: Path, cfg: Config, samples: list[dict], evaluated=None, metrics: list[dict] = METRICS) -> Path:
    """A cut-off Stage 2 with these groups, and an evaluation of it where there are rows."""
    (run / "stage2").mkdir(parents=True)
    (run / "stage2" / "config.json").write_text(json.dumps(to_dict(cfg)))
    lines = [json.dumps(row) + "\n" for row in metrics]
    (run / "stage2" / "metrics.jsonl").write_text("".join(lines) + '{"k": 4, "k')
    (run / "stage2" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if evaluated:
        folder = run / "eval" / cfg.data.test_split / "stage2"
        folder.mkdir(parents=True)
        (folder / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))
        rows = {"stage2": {"greedy": {"bleu_4": {"value": 0.1234, "lo": 0.1, "hi": 0.15}}}}
        (folder.parent / "results.json").write_text(json.dumps({"settings": {}, "notes": ["a note"], "rows": rows}))
    return run


@pytest.fixture
def cfg(micro):
    return replace(micro, stage="2")


def group_of(cfg, text="<report> Left effusion. </report>", **more) -> dict:
    study = load_studies(resolve(cfg).data, "train")[0]
    worse = [candidate(0.5, similarity=0.4, visual=0.25), candidate(0.5, similarity=None, visual=0.0)]
    return {"k": 1, "id": study.id, "reference": study.report, "candidates": [candidate(1.0, text), *worse]} | more


def equations(run: Path, cfg: Config, row: dict) -> list[list[str]]:
    """The equations of every candidate on the page of a run with this group, from the best to the worst."""
    text = page.write_page(write_run(run, cfg, [row])).read_text().replace("<sub>", "_").replace("</sub>", "")
    found = [block.split("<li>")[1:] for block in re.findall(r'<ul class="equations">(.*?)</ul>', text, re.DOTALL)]
    return [[" ".join(html.unescape(line).split()) for line in lines] for lines in found]


def test_equations_by_hand(cfg, tmp_path):
    """tau 0.1, lambda_vis 0.5, format 0.5: R_text = 0.5 (0.2 + 0.4) + 0.5 * 0.6; R = 0.5 * 0.6 + 0.5 * 0.73 + 0.5."""
    cfg = replace(cfg, rewards=replace(cfg.rewards, tau=0.1, k_clin=2))
    row = {"k": 1, "id": "x", "reference": "", "candidates": [
        candidate(1.165, visual=0.73), candidate(0.9, similarity=0.4), candidate(1.165, similarity=0.5)]}  # fmt: skip
    assert equations(tmp_path / "plain", cfg, row)[0] == [
        "Eqs. 3-5: R_text = 0.5 (0.200 + 0.400) + 0.5 · 0.600 = 0.600; no clinical part, as 1 mod 2 is not 0",
        "Eq. 6: S = cos(text, image) = 0.500",
        "Eq. 7: r_vis = mean of σ((S - S_j) / 0.1) = (0.73 + 0.50) / 2 = 0.730",
        "Eq. 8: R = (1 - 0.5) 0.600 + 0.5 · 0.730 + 0.5 · 1 (format) = 1.165",
        "Eq. 9: A = (1 below - 0 above) / 2 = +0.500",
    ]
    row |= {"k": 2, "candidates": [x | {"chexbert": 0.5, "radgraph": 0.25} for x in row["candidates"]]}
    clinical = equations(tmp_path / "clinical", cfg, row)[0]
    assert clinical[0].endswith("+ 1 (0.5 · 0.500 + 0.5 · 0.250) = 0.975")
    assert explain(stage_of(cfg), row, None)["weights"] == {
        "bleu4": 0.25, "rouge_l": 0.25, "bertscore": 0.25, "chexbert": 0.25, "radgraph": 0.25, "visual": 0.5,
        "format": 0.5, "similarity": None, "reward": None}  # fmt: skip


@pytest.mark.parametrize("kind, said", [("zscore", "(1.000 - 0.500) / 0.408 = +1.224"),
                                        ("mean", "1.000 - 0.500 = +0.500")])  # fmt: skip
def test_other_ranks_and_advantages_by_hand(cfg, kind, said, tmp_path):
    cfg = replace(cfg, grpo=replace(cfg.grpo, advantage=kind), rewards=replace(cfg.rewards, rank="literal"))
    group = [candidate(reward, similarity=s, visual=rank) for reward, s, rank in
             ((1.0, 0.9, 1.0), (0.5, 0.5, 0.25), (0.0, 0.5, 0.25))]  # fmt: skip
    row = {"k": 4, "id": "x", "reference": "", "candidates": group}
    best, second, _ = equations(tmp_path / "run", cfg, row)
    assert said in best[-1]
    assert "= 1 - (1 - 1) / 2 = 1.000" in best[2] and "= 1 - (2.5 - 1) / 2 = 0.250" in second[2]


def test_the_equations_add_up_to_what_the_rewards_gave(cfg, tmp_path):
    """A group of rewards.compute_rewards itself: every printed sum is its number, to the last digit shown."""
    from rewards import Scorers, compute_rewards

    texts = [["<report> FINDINGS: left effusion. IMPRESSION: no. </report>", "no tags", "<report> b c d e </report>"]]
    scorers = Scorers(label=lambda t: np.eye(2, 14) > 0, bertscore=lambda *_: [0.5, 0.7],
                      radgraph=lambda *_: [0.25, 0.5],
                      similarity=lambda *_: torch.tensor([[0.3, 0.6, 0.35]]))  # fmt: skip
    total, parts = compute_rewards(texts, ["left effusion"], [None], ["x"], scorers, cfg.rewards, k=2, stage=2)
    columns = {"reward": total, **parts}
    rows = [{"text": t} | {n: None if v[0, i] != v[0, i] else v[0, i].item() for n, v in columns.items()}
            for i, t in enumerate(texts[0])]  # fmt: skip
    checked = 0
    for lines in equations(tmp_path / "run", cfg, {"k": 2, "id": "x", "reference": "", "candidates": rows}):
        for line in lines:
            left, _, value = line.split(";")[0].partition(": ")[2].rpartition(" = ")
            term = left.split(" = ")[-1].replace("below", "").replace("above", "").replace("·", "*")
            term = re.sub(r"(?<=[\d)]) (?=[\d(])", " * ", term.replace("(format)", ""))
            if re.fullmatch(r"[-+*/(). \d]+", term):
                assert eval(term) == pytest.approx(float(value), abs=6e-3), line
                checked += 1
    assert checked == 3 * 3 + 2  # Eqs. 3-5, 8 and 9 of each, Eq. 7 of the readable ones


def test_a_group_with_its_tokens(cfg, tmp_path):
    found = {"pieces": [8, 6, 0], "ratio": [1.0, 1.5, 1.0], "clipped": [1], "kl": [0.0, 0.2, 0.1]}
    found |= {"moved": [0.0, 0.7, -0.7]}
    group = [candidate(reward, "<report> edema") | found for reward in (1.0, 0.0)]
    row = group_of(cfg, greedy=["<report> a b </report>", "<report> a c </report>"], candidates=group)
    text = page.write_page(write_run(tmp_path / "run", cfg, [row])).read_text()
    first, second, end, *_ = re.findall(r'<i (.*?)title="(.*?)"\s+style="(.*?)">(.*?)</i>', text, re.DOTALL)
    assert (first[3], second[3], end[3]) == ("&lt;report&gt;", " edema", "■")
    assert second[1] == "KL 0.200, ratio 1.500, clipped, then 2.01 times as likely"
    assert [x[0].strip() for x in (first, second)] == ['class=""', 'class="clipped"']
    assert second[2] == "--s1:1;--s2:1;--s3:1;" and end[2] == "--s1:0.67;--s2:-1;--s3:0.5;"
    assert 'a <del>b</del> <ins>c</ins>' in text and "Not a word:" not in text
    row["greedy"] = row["greedy"][:1] * 2
    text = page.write_page(write_run(tmp_path / "same", cfg, [row])).read_text()
    assert "<del>" not in text and "Not a word:" in text


def test_a_report_runs_nothing(cfg, tmp_path):
    bad = '<report> </p><script>alert("x")</script> Left effusion <img src=x onerror=alert(1)>. </report>'
    row = {"id": "<b>id</b>", "reference": bad, "report": bad, "labels": ["edema"], "stated": []}
    cfg = replace(cfg, data=replace(cfg.data, prompt=bad))
    run = write_run(tmp_path / "run", cfg, [group_of(cfg, bad, reference=bad, greedy=[bad, bad + " a"])], [row])
    html = page.write_page(run).read_text()
    assert html.count("<script>") == 1 and "<img src=x" not in html and "<b>id</b>" not in html
    assert "&lt;script&gt;alert(" in html and '<mark class="invented"' in html


def test_a_page_holds_everything_itself(cfg, tmp_path):
    row = {"id": load_studies(resolve(cfg).data, "test")[0].id, "reference": "Edema.", "report": "Edema.", "labels": []}
    run = write_run(tmp_path / "run", cfg, [group_of(cfg)], [row])
    path = page.write_page(run)
    html = path.read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html) and "@import" not in html and len(html) < page.LARGEST
    assert html.count("data:image/png;base64,") == 2 and 'aria-label="X-ray of study' in html
    assert "12.3 <small>[10.0," in html and "not finished" in html and "a note" in html
    for link in re.findall(r'href="([^"#:]+\.py)"', html):
        assert (path.parent / link).exists(), link
    assert oct(path.stat().st_mode)[-3:] == "600"


def test_a_run_without_groups_or_evaluation_has_a_page(cfg, tmp_path, capsys, monkeypatch):
    html = page.write_page(write_run(tmp_path / "run", cfg, [])).read_text()
    assert "No group was recorded." in html and "No policy of this run was evaluated." in html
    monkeypatch.setattr("sys.argv", ["page", "--run", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="page: .*nowhere: no run folder"):
        page.main()
    (tmp_path / "run" / "stage2" / "samples.jsonl").write_text("{}\nnonsense\n")
    with pytest.raises(ValueError, match="samples.jsonl: line 2: not JSON"):
        page.write_page(tmp_path / "run")


@pytest.mark.parametrize("images", [False, True])
def test_mimic_is_warned_of_and_its_images_left_out(images, cfg, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(page, "read_pictures", lambda cfg, split, ids: seen.append(split) or {})
    mimic = replace(cfg, data=replace(cfg.data, format="mimic"))
    row = {"id": "s1", "reference": "Edema.", "report": "Edema."}
    (tmp_path / "run" / "attention").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "run" / "attention" / "one.png")
    html = page.write_page(write_run(tmp_path / "run", mimic, [group_of(cfg)], [row]), images).read_text()
    assert "Not to be shared" in html and seen == ["train", "test"] * images
    assert ("data:image" in html) == images


def test_what_is_not_known_is_left_out(cfg, tmp_path):
    """Real images: no truth, so nothing is marked; where the folder is gone, a line says so."""
    row = {"id": "s1", "reference": "Left effusion.", "report": "Left effusion."}
    real = replace(cfg, data=replace(cfg.data, path=str(tmp_path / "gone")))
    html = page.write_page(write_run(tmp_path / "run", real, [group_of(cfg)], [row])).read_text()
    assert "<mark" not in html and 'value="invented"' not in html and 'value="differs"' in html
    assert "No images of the split train" in html and "Not to be shared" not in html


def test_gold_labels_are_not_taken_for_exact_truth(cfg, tmp_path, monkeypatch):
    """They come from reports, by findings that the marks do not know."""
    study = load_studies(resolve(cfg).data, "train")[0]
    gold = replace(cfg, data=replace(resolve(cfg).data, labels="gold.csv"))
    monkeypatch.setattr(page, "read_split", lambda data, split: ([replace(study, labels=["hernia"])], {}))
    row = {"id": study.id, "reference": "Left effusion.", "report": "Left effusion.", "labels": ["hernia"]}
    text = page.write_page(write_run(tmp_path / "run", gold, [group_of(cfg)], [row])).read_text()
    assert "data:image" in text and "<mark" not in text and 'value="invented"' not in text


def test_exact_truth_may_have_no_outlines(cfg, tmp_path):
    """truth.jsonl as the documents ask for it, {"id", "labels"}: marks, but nothing is said of what is where."""
    data = resolve(cfg).data
    shutil.copytree(data.path, tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data" / "truth.jsonl").read_text().splitlines()]
    lines = [json.dumps({"id": row["id"], "labels": row["labels"]}) + "\n" for row in rows]
    (tmp_path / "data" / "truth.jsonl").write_text("".join(lines))
    plain = replace(cfg, data=replace(data, path=str(tmp_path / "data")))
    text = page.write_page(write_run(tmp_path / "run", plain, [group_of(cfg)])).read_text()
    assert "<mark" in text and "data:image" in text and "In the image" not in text and "<polygon" not in text


def test_a_large_page_shows_less(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 60_000)
    groups = [group_of(cfg, "<report> " + "word " * 999 + "</report>", k=k) for k in range(1, 20)]
    html = page.write_page(write_run(tmp_path / "run", cfg, groups)).read_text()
    assert re.search(r"[12] of 19 recorded groups, evenly spread", html)
    assert pick(list(range(19)), 4) == [0, 6, 12, 18] and pick([], 3) == [] and pick([1, 2], 3) == [1, 2]


def test_curves_and_unusual_updates(cfg, tmp_path):
    metrics = [{"k": k, "kl": 0.1 + 0.001 * (k % 5), "reward/total": 1.0 + 0.01 * (k % 3)} for k in range(1, 31)]
    for k in (4, 8, 12, 16, 20, 24, 28):
        metrics[k - 1] |= {"reward/total": 2.0 + 0.01 * k, "reward/chexbert": 0.5}
    metrics[20]["kl"] = 0.4
    stage = stage_of(cfg, log=pd.DataFrame(metrics).set_index("k"))
    [(_, *found, near)] = unusual([stage], [{"stage": stage, "k": k} for k in (1, 20)])
    assert found[:2] == [21, "kl"] and found[2:] == pytest.approx([0.4, 0.298]) and near["k"] == 20
    run = write_run(tmp_path / "run", cfg, [group_of(cfg, k=k) for k in (1, 20)], metrics=metrics)
    text = page.write_page(run).read_text()
    assert "update 21: kl 0.400,\n+0.298 from the median around it" in text and "group: update 20</a>" in text
    charts = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", text.split('class="charts"')[1], re.DOTALL)
    assert [key for key, _ in charts] == ["reward/total", "reward/chexbert", "kl"]
    raw, mean = re.findall(r'points="(.*?)"', charts[2][1], re.DOTALL)
    raw = [tuple(map(float, point)) for point in zip(*[iter(raw.split())] * 2, strict=True)]
    assert raw[0][0] == 0.0 and raw[-1][0] == 300.0 and raw[20] == pytest.approx((206.9, 0.0), abs=0.1)
    assert len(raw) == 30 and float(mean.split()[41]) > 50  # the peak, smoothed
    assert [float(x) for x in re.findall(r'cx="(.*?)"', charts[2][1])] == pytest.approx([0.0, 196.6], abs=0.1)


def test_an_outline_runs_around_its_mask():
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:6] = True
    [line] = outline(mask)
    assert line.min(axis=0).tolist() == [3.0, 2.0] and line.max(axis=0).tolist() == [6.0, 4.0]
    assert encode_mask(mask)["size"] == [6, 8]


def test_every_function_that_the_page_names_is_there():
    root = Path(page.__file__).parents[1]
    template = Path(page.__file__).with_name("page.html.jinja").read_text()
    links = re.findall(r'"([\w/]+\.py): (\w+)"', template)
    assert len(links) == 16 and len(links) == template.count('.py: ')
    for path, function in links:
        assert re.search(rf"^(def|class) {function}\b", (root / path).read_text(), re.MULTILINE), (path, function)


def test_equations_name_no_clinical_part_where_there_is_never_one(cfg, tmp_path):
    never = replace(cfg, rewards=replace(cfg.rewards, k_clin=0))
    assert "clinical" not in equations(tmp_path / "run", never, group_of(cfg, k=3))[0][0]
