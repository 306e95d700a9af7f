"""Reports side by side: the rule that chooses the studies, the layout, the command on an evaluated run."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from config import to_dict
from evidence import side_by_side
from evidence.phrases import mark_report
from evidence.side_by_side import choose, lay_out
from phantom import cache


def test_the_rule_by_hand(monkeypatch):
    """Differences 0, -1, 1, .2 (F1 1/1 - .8) and 0: sorted -1, 0, 0, .2, 1; s4 shows nothing and does not count."""
    monkeypatch.setattr(side_by_side, "QUANTILES", (0, 0.5, 0.75, 1))
    labels = {"s0": ["edema"], "s1": ["edema"], "s2": ["edema"], "s3": ["edema", "device"], "s4": [], "s5": ["device"]}
    ours = dict(s0="Edema.", s1="Clear.", s2="Edema.", s3="Edema and a pacemaker.", s4="Edema.", s5="Clear.")
    theirs = ours | {"s1": "Edema.", "s2": "", "s3": "Edema, a pacemaker, left nodule."}
    rows = [{s: {"report": text, "labels": labels[s]} for s, text in each.items()} for each in (ours, theirs)]
    assert choose(*rows) == {"s1": -1, "s5": 0, "s3": pytest.approx(0.2), "s2": 1}
    with pytest.raises(ValueError, match="no study shows a finding"):
        choose({"s4": rows[0]["s4"]}, rows[1])
    with pytest.raises(ValueError, match="no study shows a finding"):
        choose({"a": {"report": "Edema."}}, {"a": {"report": "Edema."}})


def test_words_stand_in_lines_with_their_marks():
    text = "FINDINGS: Edema. Left effusion is seen. IMPRESSION: Edema."
    placed, lines = lay_out(text, mark_report(text, ["edema"])[0], 16)
    assert placed == [(0, 0, "FINDINGS:", "plain"), (0, 10, "✓Edema", "right"), (0, 16, ".", "plain"),
                      (1, 0, "✗Left", "invented"), (1, 6, "effusion", "invented"), (2, 0, "is", "invented"),
                      (2, 3, "seen", "invented"), (2, 7, ".", "plain"), (3, 0, "IMPRESSION:", "plain"),
                      (4, 0, "✓Edema", "right"), (4, 6, ".", "plain")]  # fmt: skip
    assert lines == 5 and lay_out("", [], 16) == ([], 1)


def test_the_command_draws_an_evaluated_run(micro, tmp_path, monkeypatch, capsys):
    truth = [json.loads(line) for line in (cache.asset_dir(micro) / "data" / "truth.jsonl").read_text().splitlines()]
    run = tmp_path / "run"
    for name in ("base", "sft", "stage1_continued"):
        (run / "eval" / "test" / name).mkdir(parents=True)
        rows = [{"id": row["id"], "report": "Edema. No nodule.", "reference": "Left effusion.", "labels": row["labels"]}
                for row in truth if row["split"] == "test"]  # fmt: skip
        (run / "eval/test" / name / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "sft" / "adapter").mkdir(parents=True)
    (run / "sft" / "config.json").write_text(json.dumps(to_dict(replace(micro, run=str(run)))))
    monkeypatch.setattr("sys.argv", ["side_by_side", "--run", str(run), "--policy", "base, sft"])
    side_by_side.main()
    assert f"written: {run}/eval/test/side_by_side.png" in capsys.readouterr().out
    with Image.open(run / "eval/test/side_by_side.png") as drawn:
        assert drawn.width > 500 and drawn.height > 800
    monkeypatch.setattr("sys.argv", ["side_by_side", "--run", str(run), "--policy", "stage9"])
    with pytest.raises(SystemExit, match="side_by_side: .*stage9/reports.jsonl"):
        side_by_side.main()
