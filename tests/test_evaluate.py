"""evaluate.py and what serves it: rows, files and error lines, with a policy and scorers that are plain functions."""

import dataclasses
import json
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
from config import DataConfig, to_dict
from evaluate import EvalRun
from evidence import inputs, judge, meteor, metrics, tables
from evidence.metrics import METRICS
from phantom.text import NORMAL_TEMPLATE

# what the stand-in policy says of a study, and what is in its image
STUDIES = {
    "s0": ("There is a left pleural effusion.", ["effusion_left"]),
    "s1": ("The heart is enlarged.", ["cardiomegaly"]),
    "s2": ("There is a right pneumothorax.", ["pneumothorax_left"]),
    "s3": ("The lungs are clear.", []),
}


def sections(text):
    return f"FINDINGS: {text} IMPRESSION: {text}"


def make_adapter(folder: Path) -> None:
    """A folder that looks like an adapter; the stand-in policy loads none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(1)}, folder / "adapter_model.safetensors")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A data set on disk, and a policy that recognises its images by their grey value."""
    folder = tmp_path / "data"
    rows, truth = [], []
    for i, (study_id, (_, labels)) in enumerate(STUDIES.items()):
        (folder / "images" / study_id).mkdir(parents=True)
        Image.new("L", (16, 16), 10 * i).save(folder / "images" / study_id / "0.png")
        rows.append({"id": study_id, "report": sections("The lungs are clear."), "image_path": [f"{study_id}/0.png"]})
        truth.append({"id": study_id, "labels": labels})
    (folder / "annotation.json").write_text(json.dumps({"test": rows}))
    (folder / "truth.jsonl").write_text("\n".join(map(json.dumps, truth)))

    def generate_reports(model, processor, images, cfg, *, ids, samples):
        assert len(images) <= cfg.eval.batch_size and model in ("base", "sft")
        texts = [STUDIES[f"s{views[0].getpixel((0, 0))[0] // 10}"][0] for views in images]
        if samples:
            return [[f"<report> {sections(text)} </report>", "<report> nothing"][:samples] for text in texts]
        return [[f"<report> {sections(text)} </report>"] for text in texts]

    scorers = SimpleNamespace(
        label=lambda texts: np.array([["effusion" in text] + ["enlarged" in text] + [False] * 12 for text in texts]),
        bertscore=lambda c, r: [float(a == b) for a, b in zip(c, r, strict=True)],
        radgraph=lambda c, r: [0.5] * len(c),
    )
    monkeypatch.setattr(evaluate, "load_policy", lambda cfg, adapter: ("sft" if adapter else "base", None))
    monkeypatch.setattr("evidence.generate.generate_reports", generate_reports)
    monkeypatch.setattr(evaluate, "generate_reports", generate_reports)
    monkeypatch.setattr(evaluate, "resolve", lambda cfg, needs: cfg)
    monkeypatch.setattr(judge, "load_scorers", lambda cfg, device, with_expert, without: scorers)
    cfg = EvalRun(run=str(tmp_path / "run"))
    cfg.data.path, cfg.eval.batch_size, cfg.eval.samples, cfg.eval.bootstrap = str(folder), 3, 2, 30
    make_adapter(tmp_path / "run/sft/adapter")
    return cfg


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)


def policies(cfg):
    return inputs.find_policies(Path(cfg.run), cfg.policy)


def settings(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", *words])
        return inputs.begin(EvalRun(), "")


def read(path):
    return json.loads(path.read_text())


def call(monkeypatch, capsys, *argv):
    """(exit message or None, stdout) of evaluate.main."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    message = None
    try:
        evaluate.main()
    except SystemExit as stop:
        message = stop.code
    return message, capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- run


def test_every_policy_of_a_run_is_scored_with_its_controls(world, tmp_path, capsys):
    evaluate.evaluate_run(world)
    folder = tmp_path / "run/eval/test"
    rows = read(folder / "results.json")["rows"]
    assert list(rows) == ["fixed normal template", "base", "base, image shuffled", "sft", "sft, image shuffled"]
    greedy = rows["sft"]["greedy"]
    # 3 stated: the effusion and the heart are there, the pneumothorax is on the other side
    assert greedy["counts"] == read(folder / "sft/results.json")["greedy"]["counts"]
    assert [greedy["counts"][k] for k in ("stated", "hallucinated", "wrong_side", "true", "omitted")] == [3, 1, 1, 3, 1]
    assert greedy["format_rate"]["value"] == 1 and rows["sft"]["sampled"]["format_rate"]["value"] == 0.5
    assert greedy["n"] == 4 and set(greedy["per_label"]["Cardiomegaly"]) == {"precision", "recall", "f1", "support"}
    assert greedy["hallucination_rate"]["lo"] <= 1 / 3 <= greedy["hallucination_rate"]["hi"]
    shuffled = rows["sft, image shuffled"]["greedy"]["counts"]
    assert shuffled["stated"] == 3 and shuffled["correct"] == 0  # every finding stands in one image only
    template = rows["fixed normal template"]["greedy"]
    assert template["counts"]["stated"] == 0 and template["counts"]["omitted"] == 3
    assert template["hallucination_rate"]["value"] is None and "format_rate" not in template
    out = capsys.readouterr().out
    assert "meteor" not in greedy and "33.3 (3)" in out and out.count("METEOR needs Java") == 1
    heads, row = (next(line for line in out.splitlines() if word in line).split() for word in ("METEOR", "sft "))
    assert row[1 + heads.index("METEOR")] == "n/a"
    assert {"-4*", "-L*", "BLEU*", "F1*", "Score*"} <= {*heads} and "\n*: also a reward of the training.\n" in out
    assert max(map(len, (line for line in out.splitlines() if not line.startswith("written")))) <= 150


def test_files_of_a_policy(world, tmp_path):
    world.policy, world.split = "sft", "test"
    evaluate.evaluate_run(world)
    folder = tmp_path / "run/eval/test"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "results.json", "results.md", "sft"]
    rows = [json.loads(line) for line in (folder / "sft/reports.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(STUDIES)
    assert rows[2]["labels"] == ["pneumothorax_left"] and rows[2]["stated"] == ["pneumothorax_right"]
    assert rows[1]["report"] == sections("The heart is enlarged.") and rows[1]["tagged"]
    assert rows[1]["samples"] == [sections("The heart is enlarged."), "nothing"]  # stray tags are stripped
    result = read(folder / "sft/results.json")
    used = {name: value for name, value in to_dict(world)["scorers"].items() if name != "expert"}
    used["radgraph"] = "rules"
    assert result["settings"]["scorers"] == used and result["adapter"].endswith("sft/adapter")
    text = (folder / "results.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert sum(row[0].startswith(":--") for row in cells) == 5 == [row[0] for row in cells].count("") + 1
    assert [row[0] for row in cells].count("sft, image shuffled") == 4
    # the policy states cardiomegaly and an effusion once each, the references nothing
    assert ["Cardiomegaly", "0", "0.0 / 0.0 / 0.0"] in [row[:3] for row in cells] and "4 studies, test" in text
    assert not list(folder.rglob("*.tmp"))


def test_the_table_leaves_out_other_settings(world, capsys):
    world.policy = "base"
    evaluate.evaluate_run(world)
    evaluate.evaluate_run(dataclasses.replace(world, policy="sft", data=dataclasses.replace(world.data, limit=3)))
    out = capsys.readouterr().out
    assert "not shown, evaluated with other settings: base" in out
    assert "base, image" not in out.split("3 studies")[1]


def test_two_processes_may_finish_at_once(world, tmp_path):
    """Each has saved its policy before it writes the table, so the last table has both."""
    world.policy = "base,sft"
    evaluate.evaluate_run(world)
    folder = tmp_path / "run/eval/test"
    settings = read(folder / "sft/results.json")["settings"]
    with ThreadPoolExecutor(2) as pool:  # the lock parts open files, so threads show it as processes do
        list(pool.map(tables.finish, [folder] * 40, [settings] * 40, [{}] * 40))
    assert list(read(folder / "results.json")["rows"])[-1] == "sft, image shuffled"


def test_policies_by_name_and_folder(world, tmp_path):
    other = tmp_path / "elsewhere/best/adapter"
    other.mkdir(parents=True)
    make_adapter(other)
    world.policy = f"sft, {other}"
    assert policies(world) == {"sft": tmp_path / "run/sft/adapter", "best": other}
    world.policy = "stage9"
    with pytest.raises(ValueError, match=r"policy 'stage9': neither in .* \(which has base, sft\)"):
        policies(world)


def test_settings_come_from_the_run_and_flags_win(world, tmp_path, monkeypatch):
    trained = dataclasses.replace(world, seed=5, run="moved since")
    config = to_dict(trained)
    for name in ("policy", "split", "predictions", "references", "compare", "image", "attention"):
        config.pop(name)
    (tmp_path / "run/sft/config.json").write_text(json.dumps(config))
    cfg = settings("--run", str(tmp_path / "run"), "--eval.samples", "1")
    assert (cfg.seed, cfg.data.path, cfg.eval.samples, cfg.run) == (5, world.data.path, 1, world.run)
    assert settings(f"--run={tmp_path / 'run'}", "--seed", "7").seed == 7
    assert settings("--run", str(tmp_path / "nothing")).seed == 0
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs/phantom")
    monkeypatch.chdir(tmp_path)
    cfg = settings()
    assert (cfg.seed, cfg.run) == (5, "runs/phantom")  # not the path at which it was trained


def test_a_command_begins_with_as_many_threads_as_it_is_given(tmp_path):
    before = torch.get_num_threads()
    settings("--run", str(tmp_path), "--threads", "3")
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_where_one_policy_is_meant_two_are_one_line(world):
    (Path(world.run) / "sft/adapter").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="--policy base,sft: name one policy"):
        inputs.one_policy(Path(world.run), "base,sft")


def test_a_recorded_setting_that_is_no_longer_known_stops_nothing(world, tmp_path, capsys):
    config = to_dict(world) | {"seed": 5, "gone": 1}
    config["grpo"]["gone_too"] = 2
    (tmp_path / "run/sft/config.json").write_text(json.dumps(config))
    assert settings("--run", world.run).seed == 5
    [line] = capsys.readouterr().out.splitlines()
    assert "grpo.gone_too, gone" in line and "ignored" in line


@pytest.mark.parametrize("flags", [["--compare", "runs/a", "runs/b"], ["--predictions", "P", "--references", "R"]])
def test_what_concerns_no_run_reads_no_runs_settings(tmp_path, monkeypatch, capsys, flags):
    (tmp_path / "runs/phantom/sft/adapter").mkdir(parents=True)
    (tmp_path / "runs/phantom/sft/config.json").write_text('{"seed": "unreadable"}')
    monkeypatch.chdir(tmp_path)
    assert settings(*flags).seed == 0 and not capsys.readouterr().out
    assert "results on split 'test'" in call(monkeypatch, capsys, "--compare", "runs/a", "runs/b")[0]
    assert "seed" in call(monkeypatch, capsys)[0]  # what does concern the run says what is wrong with it


# ----------------------------------------------------------------------------------------------------- predictions


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_predictions_without_any_model(tmp_path, monkeypatch, capsys):
    texts = ["The lungs are clear.", "Left effusion.", "Large heart."]
    references = jsonl(tmp_path / "R.jsonl", [{"id": i, "report": text} for i, text in enumerate(texts)])
    rows = [{"id": str(i), "report": text} for i, text in enumerate(texts)]
    predictions = jsonl(tmp_path / "P.jsonl", rows[::-1])
    monkeypatch.setattr("scorers.load.load_chexbert", None)  # calling them would fail
    monkeypatch.setattr("scorers.load.load_bertscore", None)
    message, out = call(monkeypatch, capsys, "--predictions", predictions, "--references", references)
    assert message is None
    rows = read(tmp_path / "P_eval/results.json")["rows"]
    assert list(rows) == ["fixed normal template", "P", "P, references shuffled"]
    assert rows["P"]["greedy"]["bleu_1"]["value"] == pytest.approx(1)
    assert rows["P, references shuffled"]["greedy"]["bleu_1"]["value"] < 0.5
    assert "format_rate" not in rows["P"]["greedy"] and "sided_f1" not in rows["P"]["greedy"]
    assert "RadGr." not in out and "sided" not in out and "*" not in out.partition("written")[0]
    assert "want of --scorers.chexbert, --scorers.bert, --scorers.bertscore, --scorers.radgraph" in out
    assert (tmp_path / "P_eval/P/reports.jsonl").exists()


def test_predictions_with_labels_are_held_against_the_truth(world, tmp_path, monkeypatch, capsys):
    rows = [{"id": k, "report": "Clear.", "labels": labels} for k, (_, labels) in STUDIES.items()]
    references = jsonl(tmp_path / "R.jsonl", rows)
    predictions = jsonl(tmp_path / "P.jsonl", [{"id": k, "report": text} for k, (text, _) in STUDIES.items()])
    message, _ = call(monkeypatch, capsys, "--predictions", predictions, "--references", references)
    assert message is None
    greedy = read(tmp_path / "P_eval/results.json")["rows"]["P"]["greedy"]
    assert greedy["counts"]["hallucinated"] == 1 and greedy["f1_micro"]["value"] == 0


def test_predictions_with_green_and_ratescore(tmp_path, monkeypatch, capsys):
    """Scored where they are asked for, for greedy reports alone: a judge of 7B takes hours for as many again."""
    texts = ["The lungs are clear.", "Left effusion.", "Large heart."]
    references = jsonl(tmp_path / "R.jsonl", [{"id": i, "report": text} for i, text in enumerate(texts)])
    predictions = jsonl(tmp_path / "P.jsonl", [{"id": i, "report": text} for i, text in enumerate([*texts[:2], " "])])
    loaded, judged = [], []

    def green(candidates, references):
        judged.append(candidates)
        return [None if c == texts[0] else float(c == r) for c, r in zip(candidates, references, strict=True)]

    def ratescore(candidates, references):
        judged.append(candidates)
        return [0.25] * len(candidates)

    def load_green(path, device):
        loaded.append(path)
        return green

    def load_ratescore(python):
        loaded.append(python)
        return ratescore

    monkeypatch.setattr(judge, "load_green", load_green)
    monkeypatch.setattr(judge, "load_ratescore", load_ratescore)
    flags = ["--predictions", predictions, "--references", references]
    message, out = call(monkeypatch, capsys, *flags)
    assert message is None and not loaded and "GREEN" not in out
    message, out = call(monkeypatch, capsys, *flags, "--eval.green", "judge", "--eval.ratescore", "other/python")
    assert message is None and loaded == ["judge", "other/python"]
    rows = {name: row["greedy"] for name, row in read(tmp_path / "P_eval/results.json")["rows"].items()}
    assert rows["P"]["green"]["value"] == 0.5 and rows["P"]["green"]["unread"] == 1  # of the two readable answers
    assert rows["P"]["ratescore"]["value"] == 0.25 and judged == [[*texts[:2], ""]] * 2
    assert not {"green", "ratescore"} & (rows["P, references shuffled"].keys() | rows["fixed normal template"].keys())
    assert "left out of its mean: P 1 of 3." in out
    assert "1 empty reports, scored as they are (first: id 2)" in out
    settings = read(tmp_path / "P_eval/results.json")["settings"]["eval"]
    assert settings["green"] == "judge" and "ratescore" not in settings  # another judge is another number


def ones(candidates, references):
    return [1.0] * len(candidates)


@pytest.mark.parametrize(
    ("flags", "scored", "missing"),
    [
        (["chexbert", "bert"], {"f1_macro_5"}, "--scorers.bertscore, --scorers.radgraph:"),
        (["bertscore"], {"bertscore"}, "--scorers.chexbert, --scorers.bert, --scorers.radgraph:"),
        (["chexbert"], set(), "--scorers.bert, --scorers.bertscore, --scorers.radgraph:"),
        (["chexbert", "bert", "bertscore"], {"f1_macro_5", "bertscore"}, "want of --scorers.radgraph:"),
        (["chexbert", "bert", "bertscore", "radgraph"], {"f1_macro_5", "bertscore", "radgraph_f1"}, ""),
    ],
)
def test_real_reports_are_scored_by_what_was_given(tmp_path, monkeypatch, capsys, flags, scored, missing):
    """The phantom's scorers and rules judge none of them; what is missing is named. No metric uses the expert."""
    rows = jsonl(tmp_path / "R.jsonl", [{"id": i, "report": "Clear."} for i in range(3)])
    label = lambda texts: np.ones((len(texts), 14), bool)  # noqa: E731
    monkeypatch.setattr("scorers.load.load_chexbert", lambda *args: label)
    monkeypatch.setattr("scorers.load.load_bertscore", lambda *args: ones)
    monkeypatch.setattr(evaluate, "resolve", lambda cfg, needs: cfg)
    words = [word for name in flags for word in (f"--scorers.{name}", "rules" if name == "radgraph" else "own")]
    message, out = call(monkeypatch, capsys, "--predictions", rows, "--references", rows, *words)
    assert message is None and missing in out and bool(missing) == ("for want of" in out)
    row = read(tmp_path / "R_eval/results.json")["rows"]["R"]["greedy"]
    assert {"f1_macro_5", "bertscore", "radgraph_f1"} & row.keys() == scored
    assert "f1_macro_5" not in row or row["per_label"]["Edema"]["support"] == 3 == row["n"]


def test_a_run_on_real_data_is_judged_by_no_scorer_of_the_phantom(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "data/truth.jsonl").unlink()
    world.model.path, needed = "real/base", []
    monkeypatch.setattr(evaluate, "resolve", lambda cfg, needs: needed.append(needs) or cfg)
    seen = {}
    nothing = SimpleNamespace(label=None, bertscore=None, radgraph=None)
    monkeypatch.setattr(judge, "load_scorers", lambda *args, **named: seen.update(named) or nothing)
    evaluate.evaluate_run(world)
    assert needed == [("data", "base")] and "--scorers.chexbert" in seen["without"]
    assert "for want of --scorers.chexbert, --scorers.bert, --scorers.bertscore, --scorers.radgraph:" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("labels", [["Cardiomegaly"], [0.0] * 14, "cardiomegaly", ["effusion_left", 1], {"a": 1}, 3])
@pytest.mark.parametrize("of", ["references", "predictions"])
def test_foreign_labels_are_refused_with_their_row(tmp_path, monkeypatch, capsys, labels, of):
    rows = [{"id": 0, "report": "a"}, {"id": 1, "report": "a", "labels": labels}]
    paths = {name: jsonl(tmp_path / name, rows if name == of else [{"id": i, "report": "a"} for i in range(2)])
             for name in ("predictions", "references")}  # fmt: skip
    message, _ = call(monkeypatch, capsys, *(word for name, path in paths.items() for word in (f"--{name}", path)))
    assert message.startswith(f"evaluate.py: {paths[of]}: row 2: labels") and "\n" not in message


def test_rows_that_are_less_than_whole_are_counted_and_named(tmp_path, monkeypatch, capsys):
    """A null report scores low; a study without a reference is left out; labels of some rows are no truth."""
    said = {"a": "Clear.", "b": None, "c": "Clear.", "d": " "}
    wanted = {"a": "Clear.", "b": "Clear.", "c": None, "d": "Clear."}
    predictions = jsonl(tmp_path / "P.jsonl", [{"id": k, "report": text} for k, text in said.items()])
    rows = [{"id": k, "report": text, "labels": None if k == "d" else ["cardiomegaly"]} for k, text in wanted.items()]
    references = jsonl(tmp_path / "R.jsonl", rows)
    message, out = call(monkeypatch, capsys, "--predictions", predictions, "--references", references)
    assert message is None and "3 studies" in out
    assert "P.jsonl: 2 empty reports, scored as they are (first: id b)" in out
    assert "R.jsonl: 1 empty references, left out (first: id c)" in out
    assert "R.jsonl: 1 rows without labels, so no report is held against the exact truth (first: id d)" in out
    greedy = read(tmp_path / "P_eval/results.json")["rows"]["P"]["greedy"]
    assert "sided_f1" not in greedy
    assert greedy["rouge_l"]["value"] == pytest.approx(1 / 3) and greedy["length"]["value"] == pytest.approx(1 / 3)


def test_empty_labels_are_no_exact_truth_and_tags_of_references_no_words(tmp_path, monkeypatch, capsys):
    predictions = jsonl(tmp_path / "P.jsonl", [{"id": i, "report": "Clear lungs."} for i in range(2)])
    rows = [{"id": i, "report": "<report> Clear lungs. </report>", "labels": []} for i in range(2)]
    message, out = call(monkeypatch, capsys, "--predictions", predictions,
                        "--references", jsonl(tmp_path / "R.jsonl", rows))  # fmt: skip
    assert message is None and "R.jsonl: 2 rows with empty labels alone, so no report is held" in out
    greedy = read(tmp_path / "P_eval/results.json")["rows"]["P"]["greedy"]
    assert greedy["rouge_l"]["value"] == 1 and "hallucination_rate" not in greedy and "f1_micro" not in greedy


def test_the_protocol_stands_on_every_table_and_keeps_others_out(tmp_path, monkeypatch, capsys):
    reference, said = "1. Clear lungs, x-ray. 2. No effusion.", "clear lungs x-ray . no effusion ."
    predictions = jsonl(tmp_path / "P.jsonl", [{"id": 0, "report": said}])
    references = jsonl(tmp_path / "R.jsonl", [{"id": 0, "report": reference}])
    flags = ["--predictions", predictions, "--references", references]
    scores = []
    for protocol in ("raw", "r2gen", "r2gen-mimic"):
        message, out = call(monkeypatch, capsys, *flags, "--eval.protocol", protocol)
        assert message is None and out.count(f"protocol {protocol}\n") == 2 and f"(--eval.protocol {protocol})" in out
        result = read(tmp_path / "P_eval/results.json")
        assert result["settings"]["eval"].get("protocol", "raw") == protocol
        scores.append(result["rows"]["P"]["greedy"]["bleu_4"]["value"])
    assert scores[0] < 0.6 and scores[1:] == pytest.approx([1, 1])


DAMAGED = ["", "{", "[]", "{}", "[" * 5000, '{"policy": 1, "settings": {}}', '{"settings": {"n": 1}}',
           '{"policy": "x", "settings": {"seed": 0, "n": 4, "split": "test"}, "notes": [], "shuffled_as": "", '
           '"template": {"n": 4}, "greedy": {"bleu_4": [0.5]}}']  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_results_of_one_policy_are_named_beside_the_others(world, tmp_path, capsys, text):
    other = tmp_path / "run/eval/test/other/results.json"
    other.parent.mkdir(parents=True)
    other.write_text(text)
    world.policy = "sft"
    evaluate.evaluate_run(world)
    out = capsys.readouterr().out
    assert f"not shown: {other}" in out and "33.3 (3)" in out


def test_many_reports_need_little_memory_and_time(monkeypatch):
    """Resamples of many studies are drawn a few at a time, and equal pairs are counted once."""
    stats = {"x": np.ones((20_000, 2))}
    monkeypatch.setattr(metrics, "AT_ONCE", 2**18)
    tracemalloc.start()
    drawn = metrics.resample(stats, 500, np.random.default_rng(0))["x"]
    assert drawn.shape == (500, 2) and (drawn == 20_000).all() and tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()
    began = time.perf_counter()
    texts = [f"No effusion, {i % 50} nodules." for i in range(20_000)]
    found = metrics.collect([[text] for text in texts], texts[::-1])
    assert found["rouge_l"].shape == (20_000, 2) and time.perf_counter() - began < 5


def test_more_studies_leave_meteor_to_the_greedy_reports(monkeypatch):
    monkeypatch.setattr(judge, "MANY", 2)
    monkeypatch.setattr(meteor.Meteor, "__call__", lambda self, c, r: np.ones((len(c), 23)))
    wanted = judge.Wanted("test", list("abc"), ["Clear."] * 3, None)
    held = judge.Judge(EvalRun(), wanted, ["--scorers.chexbert", "--scorers.bertscore", "--scorers.radgraph"])
    found = {row: "meteor" in held.score([["Clear."]] * 3, row) for row in ("greedy", "shuffled", "template")}
    assert found == {"greedy": True, "shuffled": False, "template": False} and "than 2 studies" in held.notes()[0]


@pytest.mark.parametrize("labels", [None, [["edema"]] * 3])
def test_samples_are_held_against_the_truth_alone_where_it_is_known(monkeypatch, labels):
    monkeypatch.setattr(meteor.Meteor, "__call__", lambda self, c, r: None)
    wanted = judge.Wanted("test", list("abc"), ["Edema."] * 3, labels)
    held = judge.Judge(EvalRun(), wanted, ["--scorers.chexbert", "--scorers.bertscore", "--scorers.radgraph"])
    held.quick = {"radgraph": lambda candidates, references: np.ones(len(candidates))}
    greedy, sampled = ({*held.score([["Edema."]] * 3, row)} for row in ("greedy", "sampled"))
    assert ("truth" in sampled) == (labels is not None) and ("radgraph" in sampled) == (labels is None)
    assert "radgraph" in greedy and {"format", "bleu"} <= sampled


def test_a_killed_save_leaves_no_results_json(tmp_path, monkeypatch):
    """Neither a first one nor an older one beside newer statistics: where it is, the files belong together."""
    stats = {"greedy": {"length": np.ones((2, 2))}}
    tables.save(tmp_path / "P", {"n": 1}, [{"report": "one\u2028row\x85 only"}], stats)
    [row] = (tmp_path / "P/reports.jsonl").read_text().splitlines()
    assert json.loads(row)["report"] == "one\u2028row\x85 only"

    def killed(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        tables.save(tmp_path / "P", {"n": 2}, [], stats)
    assert not (tmp_path / "P/results.json").exists()


def test_a_failing_scorer_leaves_no_results(tmp_path, monkeypatch, capsys):
    rows = jsonl(tmp_path / "R.jsonl", [{"id": i, "report": "Clear."} for i in range(3)])

    def broken(candidates, references):
        raise ValueError("eval.ratescore: no RaTEScore")

    monkeypatch.setattr(judge, "load_ratescore", lambda python: broken)
    flags = ["--predictions", rows, "--references", rows, "--eval.ratescore", "python"]
    assert call(monkeypatch, capsys, *flags)[0] == "evaluate.py: eval.ratescore: no RaTEScore"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R.jsonl"]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([{"id": 0, "report": "a"}], "P.jsonl: no row for id 1 and 1 more"),
        ([{"id": i, "report": "a"} for i in (0, 1, 2, 3)], "R.jsonl: no row for id 3"),
        ([{"id": 0, "report": "a"}] * 2, "P.jsonl: row 2: id 0 occurs twice"),
        ([{"id": 0}], "P.jsonl: row 1 needs an 'id' and a text 'report'"),
        ([{"id": 0, "report": 7}], "P.jsonl: row 1 needs an 'id' and a text 'report'"),
        ([{"id": 0, "report": "a"}, {"report": "a"}], "P.jsonl: row 2 needs an 'id' and a text 'report'"),
        ([{"id": None, "report": "a"}], "P.jsonl: row 1 needs an 'id' and a text 'report'"),
        ([{"id": 1, "report": "a"}, {"id": "1", "report": "a"}], "P.jsonl: row 2: id 1 occurs twice"),
        ([], "P.jsonl: no rows"),
    ],
)
def test_prediction_errors_are_one_line(tmp_path, monkeypatch, capsys, predictions, message):
    references = jsonl(tmp_path / "R.jsonl", [{"id": i, "report": "a"} for i in range(3)])
    path = jsonl(tmp_path / "P.jsonl", predictions)
    stop, _ = call(monkeypatch, capsys, "--predictions", path, "--references", references)
    assert message in stop and stop.startswith("evaluate.py: ") and "\n" not in stop
    assert not (tmp_path / "P_eval").exists()


def test_other_error_lines(tmp_path, monkeypatch, capsys):
    path = tmp_path / "P.jsonl"
    assert "needs --references" in call(monkeypatch, capsys, "--predictions", path)[0]
    path.write_text('{"id": 1, "report": "a"}\n{broken\n')
    assert "P.jsonl: line 2: not JSON" in call(monkeypatch, capsys, "--predictions", path, "--references", path)[0]
    path.write_bytes(b'{"id": 1, "report": "\xff"}\n')
    assert "UTF-8" in call(monkeypatch, capsys, "--predictions", path, "--references", path)[0]
    assert "No such file" in call(monkeypatch, capsys, "--image", tmp_path / "x.png", "--run", tmp_path)[0]
    assert "is for the report of one --image" in call(monkeypatch, capsys, "--attention", "x.png", "--run", tmp_path)[0]


# ----------------------------------------------------------------------------------------------------- small parts


def test_image_writes_the_last_stage_report(world, tmp_path, monkeypatch, capsys):
    image = tmp_path / "data/images/s1/0.png"
    message, out = call(monkeypatch, capsys, "--image", image, "--run", world.run)
    assert message is None and "sft, written to" in out and "Not for clinical use" in out
    place = tmp_path / "run/images" / f"{str(image).lstrip('/')}.txt"  # R2Gen's s0/0.png has another place
    assert place.read_text() == sections("The heart is enlarged.") + "\n"
    call(monkeypatch, capsys, "--image", tmp_path / "data/images/s0/0.png", "--run", world.run)
    assert place.read_text() == sections("The heart is enlarged.") + "\n"


def test_two_policies_of_one_name_are_refused(world, tmp_path):
    """One would take the other's place among the results."""
    for name in ("sft", "base"):
        other = tmp_path / "elsewhere" / name / "adapter"
        other.mkdir(parents=True)
        make_adapter(other)
        for policy in (f"{name},{other}", str(other)):
            with pytest.raises(ValueError, match=f"two adapters are called '{name}'"):
                policies(dataclasses.replace(world, policy=policy))
    with pytest.raises(ValueError, match="two adapters are called 'sft'"):
        policies(dataclasses.replace(world, policy="sft,sft"))
    again = f"{world.run}/sft/adapter"
    assert policies(dataclasses.replace(world, policy=again)) == {"sft": Path(again)}  # itself
    (tmp_path / "run/base/adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match="this name is the base model's"):
        policies(world)


def test_a_run_without_policies_and_a_flag_that_names_none_are_one_line(world, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="has no trained policy"):
        policies(dataclasses.replace(world, run=str(tmp_path / "typo")))
    image = tmp_path / "data/images/s1/0.png"
    for flags in (["--policy", ","], ["--policy", " , "], ["--image", image, "--policy", ","]):
        message, _ = call(monkeypatch, capsys, "--run", world.run, "--data.path", world.data.path, *flags)
        assert message.startswith("evaluate.py: --policy") and "names no policy" in message and "\n" not in message
    assert not (tmp_path / "run/eval").exists()


def test_derangement_has_no_fixed_point():
    for n in (2, 3, 10, 101):
        for seed in range(5):
            order = evaluate.derangement(n, seed)
            assert sorted(order) == list(range(n)) and all(i != j for i, j in enumerate(order))
    assert evaluate.derangement(10, 0) == evaluate.derangement(10, 0)
    assert evaluate.derangement(10, 0) != evaluate.derangement(10, 1)


def test_template_takes_the_form_of_the_references():
    def template(reference, labels, target, table=""):
        data = DataConfig(target=target, labels=table)
        return evaluate.normal_template(judge.Wanted("test", ["1"], [reference], labels), data)

    plain = template("The lungs are clear.", None, "both")
    assert plain.startswith("The heart size") and "IMPRESSION" not in plain and "cardiopulmonary" in plain
    assert template(sections("x"), None, "both").count(":") == 2
    assert "cardiopulmonary" not in template("x", None, "findings")
    assert template(sections("x"), [[]], "both") == NORMAL_TEMPLATE
    assert template("x", [[]], "findings", "gold.csv") == template("x", None, "findings")  # real reports, real words


def test_one_study_has_no_shuffled_row(world, tmp_path):
    world.policy, world.data.limit = "base", 1
    evaluate.evaluate_run(world)
    assert list(read(tmp_path / "run/eval/test/results.json")["rows"]) == ["fixed normal template", "base"]


def test_widest_table_fits_150_columns():
    entry = {"value": 0.555, "lo": 0.555, "hi": 0.555}
    summary = {metric: entry for metric in METRICS} | {"counts": {"stated": 12345}}
    rows = {"stage1_continued, image shuffled": {"greedy": summary, "sampled": summary}}
    for where in ("main", "spans", "clinical"):
        text = tables.grid(rows, where, to_dict(EvalRun())["rewards"])
        assert max(map(len, text.splitlines())) <= 150 and len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("off", "starred"),
    [
        ({}, "BLEU-4 mean BLEU ROUGE-L BERT Score CheXb. F1 RadGr. F1 format %"),
        ({"lambda_lex": 0.0}, "BERT Score CheXb. F1 RadGr. F1 format %"),
        ({"k_clin": 0}, "BLEU-4 mean BLEU ROUGE-L BERT Score format %"),
        ({"lambda_cx": 0.0, "lambda_sem": 0.0}, "BLEU-4 mean BLEU ROUGE-L RadGr. F1 format %"),
        (dict.fromkeys(to_dict(EvalRun())["rewards"], 0), ""),
    ],
)
def test_rewards_are_starred_by_their_weights(off, starred):
    rows = {"P": {"greedy": {metric: {"value": 0.5} for metric in METRICS} | {"counts": {"stated": 1}}}}
    heads = tables.grid(rows, "main", to_dict(EvalRun())["rewards"] | off, "pipe").splitlines()[0].split("|")
    assert " ".join(head.strip(" *") for head in heads if "*" in head) == starred


def test_every_column_shows_a_metric_there_is():
    where = ("main", "spans", "clinical", "gold", "pairs", "arms", "seeds")
    every = [column for table in where for column in tables.columns(table)]
    assert {column.key.split("/")[1] for column in every} <= METRICS.keys()
    assert len({(column.title, column.key) for column in every}) == len(tables.SHOWN["columns"])


def test_a_cut_off_adapter_is_named_before_any_policy_writes(world, monkeypatch, capsys, tmp_path):
    (tmp_path / "run/sft/adapter/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="sft/adapter/adapter_model.safetensors: broken or cut off"):
        policies(world)
