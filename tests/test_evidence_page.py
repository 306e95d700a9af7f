"""The page of a run: what stands in it, what it leaves out, and that it runs nothing that a report says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config, to_dict
from data import load_studies
from evidence import page
from evidence.curves import charts, pick, unusual
from evidence.group import Stage, changed, equations, explain
from phantom.assets import resolve
from phantom.image import encode_mask, outline

PARTS = {"bleu4": 0.2, "rouge_l": 0.4, "bertscore": 0.6, "similarity": 0.5, "visual": 0.75, "format": 1.0}


def candidate(reward: float, text: str = "<report> Left effusion. </report>", **parts) -> dict:
    return {"text": text, "reward": reward} | PARTS | parts


def stage_of(cfg: Config, **fields) -> Stage:
    return Stage(**{"name": "stage2", "title": "VALOR", "metrics": [], "samples": [], "done": False} | fields, cfg=cfg)


def write_run(run: Path, cfg: Config, samples: list[dict], evaluated: list[dict] | None = None) -> Path:
    """A cut-off Stage 2 with these groups, and an evaluation of it where there are rows."""
    (run / "stage2").mkdir(parents=True)
    (run / "stage2" / "config.json").write_text(json.dumps(to_dict(cfg)))
    metrics = [{"k": k, "kl": 0.1 * k, "reward/total": 1.0, "length": 9.0, "format_rate": 1.0} for k in (1, 2, 3)]
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


def test_equations_by_hand(cfg):
    """tau 0.1, lambda_vis 0.5, format 0.5: R_text = 0.5 (0.2 + 0.4) + 0.5 * 0.6; R = 0.5 * 0.6 + 0.5 * 0.73 + 0.5."""
    stage = stage_of(replace(cfg, rewards=replace(cfg.rewards, tau=0.1, k_clin=2)))
    row = {"k": 1, "id": "x", "reference": "", "candidates": [
        candidate(1.165, visual=0.73), candidate(0.9, similarity=0.4), candidate(1.165, similarity=0.5)]}  # fmt: skip
    c = explain(stage, row, None)["candidates"][0]
    assert c["equations"] == [
        "Eqs. 3-5: R_text = 0.5 (0.200 + 0.400) + 0.5 · 0.600 = 0.600; no clinical part, as 1 mod 2 is not 0",
        "Eq. 6: S = cos(text, image) = 0.500",
        "Eq. 7: r_vis = mean of σ((S - S_j) / 0.1) = (0.73 + 0.50) / 2 = 0.730",
        "Eq. 8: R = (1 - 0.5) 0.600 + 0.5 · 0.730 + 0.5 · 1 (format) = 1.165",
        "Eq. 9: A = (1 below - 0 above) / 2 = +0.500",
    ]
    clinical = explain(stage, row | {"k": 2, "candidates": [x | {"chexbert": 0.5, "radgraph": 0.25}
                                                            for x in row["candidates"]]}, None)  # fmt: skip
    assert clinical["candidates"][0]["equations"][0].endswith("+ 1 (0.5 · 0.500 + 0.5 · 0.250) = 0.975")
    assert clinical["weights"] == {"bleu4": 0.25, "rouge_l": 0.25, "bertscore": 0.25, "chexbert": 0.25,
                                   "radgraph": 0.25, "visual": 0.5, "format": 0.5}  # fmt: skip


@pytest.mark.parametrize("kind, said", [("zscore", "(1.000 - 0.500) / 0.408 = +1.224"),
                                        ("mean", "1.000 - 0.500 = +0.500")])  # fmt: skip
def test_other_ranks_and_advantages_by_hand(cfg, kind, said):
    cfg = replace(cfg, grpo=replace(cfg.grpo, advantage=kind), rewards=replace(cfg.rewards, rank="literal"))
    group = [candidate(1.0, similarity=0.9), candidate(0.5, similarity=0.5), candidate(0.0, similarity=0.5)]
    row = {"k": 4, "id": "x", "reference": "", "candidates": group}
    best, second, _ = explain(stage_of(cfg), row, None)["candidates"]
    assert said in best["equations"][-1]
    assert "= 1 - (1 - 1) / 2 =" in best["equations"][2] and "= 1 - (2.5 - 1) / 2 =" in second["equations"][2]


def test_the_equations_add_up_to_what_the_rewards_gave(cfg):
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
    group = explain(stage_of(cfg), {"k": 2, "id": "x", "reference": "", "candidates": rows}, None)["candidates"]
    checked = 0
    for c in group:
        for line in c["equations"]:
            left, _, value = line.split(";")[0].partition(": ")[2].rpartition(" = ")
            term = left.split(" = ")[-1].replace("below", "").replace("above", "").replace("·", "*")
            term = re.sub(r"(?<=[\d)]) (?=[\d(])", " * ", term.replace("(format)", ""))
            if re.fullmatch(r"[-+*/(). \d]+", term):
                assert eval(term) == pytest.approx(float(value), abs=6e-3), line
                checked += 1
    assert checked == 3 * 3 + 2  # Eqs. 3-5, 8 and 9 of each, Eq. 7 of the readable ones


def test_a_group_with_its_tokens(cfg):
    found = {"pieces": [8, 6, 0], "ratio": [1.0, 1.5, 1.0], "clipped": [1], "kl": [0.0, 0.2, 0.1]}
    found |= {"moved": [0.0, 0.7, -0.7]}
    row = {"k": 1, "id": "x", "reference": "r", "greedy": ["<report> a b </report>", "<report> a c </report>"],
           "candidates": [candidate(reward, "<report> edema") | found for reward in (1.0, 0.0)]}  # fmt: skip
    group = explain(stage_of(cfg), row, [])
    first, second, end = group["candidates"][0]["tokens"]
    assert (first["text"], second["text"], end["text"]) == ("<report>", " edema", "■")
    assert second["said"] == "KL 0.200, ratio 1.500, clipped, then 2.01 times as likely" and second["clipped"]
    assert second["shades"] == [1.0, 1.0, 1.0] and end["shades"] == [0.67, -1.0, 0.5]
    assert group["changed"] == "a <del>b</del> <ins>c</ins>" and changed("a", "a") == "a"
    assert "invented" in group["candidates"][0]["marked"]["html"]


def test_a_report_runs_nothing(cfg, tmp_path):
    bad = '<report> </p><script>alert("x")</script> Left effusion <img src=x onerror=alert(1)>. </report>'
    row = {"id": "<b>id</b>", "reference": bad, "report": bad, "labels": ["edema"], "stated": []}
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
    with pytest.raises(ValueError, match="samples.jsonl: not JSON .*line 2"):
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


def test_a_large_page_shows_less(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 60_000)
    groups = [group_of(cfg, "<report> " + "word " * 999 + "</report>", k=k) for k in range(1, 20)]
    html = page.write_page(write_run(tmp_path / "run", cfg, groups)).read_text()
    assert re.search(r"[12] of 19 recorded groups, evenly spread", html)
    assert pick(list(range(19)), 4) == [0, 6, 12, 18] and pick([], 3) == [] and pick([1, 2], 3) == [1, 2]


def test_curves_and_unusual_updates(cfg):
    metrics = [{"k": k, "kl": 0.1 + 0.001 * (k % 5), "reward/total": 1.0 + 0.01 * (k % 3)} for k in range(1, 31)]
    for k in (4, 8, 12, 16, 20, 24, 28):
        metrics[k - 1] |= {"reward/total": 2.0 + 0.01 * k, "reward/chexbert": 0.5}
    metrics[20]["kl"] = 0.4
    stage = stage_of(cfg, metrics=metrics)
    groups = [{"stage": stage, "k": k, "id": f"g{k}", "label": "", "metrics": metrics[k - 1]} for k in (1, 20)]
    found = unusual([stage], groups)
    said = [(k, what, near["k"]) for _, k, what, near in found]
    assert said == [(21, "kl 0.400, +0.298 from the median around it", 20)]
    chart = next(chart for chart in charts([stage], groups) if chart["key"] == "kl")
    raw = [tuple(map(float, point)) for point in zip(*[iter(chart["lines"][0][0].split())] * 2, strict=True)]
    assert raw[0][0] == 0.0 and raw[-1][0] == 300.0 and raw[20] == (206.9, 0.0) and len(raw) == 30
    assert [(g["k"], x) for g, x, _ in chart["dots"]] == [(1, 0.0), (20, 196.6)]


def test_an_outline_runs_around_its_mask():
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:6] = True
    [line] = outline(mask)
    assert line.min(axis=0).tolist() == [3.0, 2.0] and line.max(axis=0).tolist() == [6.0, 4.0]
    assert encode_mask(mask)["size"] == [6, 8]


def test_every_function_that_the_page_names_is_there(tmp_path):
    assert "grpo.py: rank_norm" in page.code("grpo.rank_norm", tmp_path)
    with pytest.raises(ValueError, match="grpo.py has no gone"):
        page.code("grpo.gone", tmp_path)


def test_equations_name_no_clinical_part_where_there_is_never_one(cfg):
    stage = stage_of(replace(cfg, rewards=replace(cfg.rewards, k_clin=0)))
    c = candidate(0.5) | {"r_text": 0.6, "mixed": 0.6, "advantage": 0.0}
    assert "clinical" not in equations(c, [c], stage, 3)[0]
