"""Damaged files of every kind before the three scripts: a run ends with one line, or goes on with a true count.

Each case damages one good file at random, by a seed, and calls the script's own `main`. An exception that is none of
the scripts' own ends (a traceback for the user) fails the test, as does a message of several lines or a wrong count.
MUTATIONS=20 pytest tests/test_bad_inputs.py tries twenty times as many.
"""

import csv
import io
import json
import os
import random
import re
import shutil
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_formats_images import write_dicom

import data
import evaluate
import train
from phantom.assets import resolve

REPORT = "FINDINGS: There is a left pleural effusion. IMPRESSION: Effusion."
ODD = [None, True, 0, -1, 2.5, 10**30, float("nan"), float("inf"), "", " ", "\ud800", "\x00", "../../etc/passwd", "/",
       "a" * 5000, "é" * 300, [], {}, [None], {"a": 1}, [[[]]]]  # fmt: skip
WORDS = [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"]", b'"', b"\n", b",", b"null", b"NaN", b"1e999", b"<",
         b"&x;", b"[" * 3000, b"\\ud800",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"]  # fmt: skip


def seeds(n: int) -> range:
    return range(n * int(os.environ.get("MUTATIONS", "1")))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes cut, flipped, doubled, with something put in or taken out."""
    at, to = sorted(rng.randrange(len(content) + 1) for _ in "ab")
    flipped = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return rng.choice([content[:at], bytes(flipped), content[:at] + rng.choice(WORDS) + content[at:], rng.choice(WORDS),
                       content[:at] + content[to:], content + content, content.replace(b"\n", b"\r\n")])  # fmt: skip


def replaced(tree, rng: random.Random):
    """A JSON tree in which one node has another value, is not there, or stands twice."""
    places = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    for node, key in places:
        if isinstance(node[key], dict | list):
            places += [(node[key], k) for k in (node[key] if isinstance(node[key], dict) else range(len(node[key])))]
    node, key = rng.choice(places)
    action = rng.randrange(4)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = rng.choice(ODD)
    return tree


def damage(path: Path, seed: int) -> None:
    """Damage a file by `seed`; a JSON file or a file of JSON lines also inside its tree, every file also as a whole."""
    rng = random.Random(f"{path.name} {seed}")
    content = path.read_bytes()
    if seed % 12 == 11:
        path.unlink()
        return path.mkdir() if seed % 24 == 11 else path.symlink_to(path.name)
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        rows = content.decode().splitlines() if path.suffix == ".jsonl" else [content]
        tree = replaced([json.loads(row) for row in rows], rng)
        path.write_text("\n".join(map(json.dumps, tree)))
    else:
        path.write_bytes(damaged(content, rng))


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, flags...) -> (exit code, the line it ended with, what it printed)."""

    def call(script, *flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            script.main()
        except SystemExit as end:
            if isinstance(end.code, str):
                assert "\n" not in end.code.strip() and len(end.code) < 2000, end.code
                return 1, end.code, capsys.readouterr().out
            assert not end.code, f"exit code {end.code} without a line: {capsys.readouterr()}"
        return 0, "", capsys.readouterr().out

    return call


def counts(card: str) -> list[tuple[int, int]]:
    """[(studies, skipped)] of each split that a card prints."""
    found = []
    for line in card.splitlines():
        if match := re.match(r"(?:train|val|test|all)\s+(\d+) +\d", line):
            found.append((int(match[1]), 0))
        elif match := re.search(r"^ +skipped (\d+):", line):
            found[-1] = (found[-1][0], int(match[1]))
    return found


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)


@pytest.fixture
def r2gen(tmp_path) -> Path:
    """Four studies a split: a PNG, a JPEG, a 16-bit PNG and a DICOM, with exact labels."""
    folder = tmp_path / "r2gen"
    images = ["0.png", "0.jpg", "deep.png", "0.dcm"]
    splits = {split: [{"id": f"{split}{i}", "report": REPORT, "image_path": [f"{i}/{name}"]}
                      for i, name in enumerate(images)] for split in ("train", "val", "test")}  # fmt: skip
    for i, name in enumerate(images):
        picture(folder / "images" / str(i) / name.replace("dcm", "png"))
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200).save(folder / "images" / "2" / "deep.png")
    write_dicom(folder / "images" / "3" / "0.dcm", np.arange(256, dtype=np.uint16).reshape(16, 16))
    (folder / "annotation.json").write_text(json.dumps(splits))
    labels = [{"id": row["id"], "labels": ["effusion_left"]} for rows in splits.values() for row in rows]
    (folder / "truth.jsonl").write_text("\n".join(map(json.dumps, labels)))
    return folder


CARD = ("--data.sft-split", "train", "--data.rl-split", "train")


@pytest.mark.parametrize("seed", seeds(24))
@pytest.mark.parametrize("name", ["annotation.json", "truth.jsonl"])
def test_r2gen(r2gen, call, name, seed):
    damage(r2gen / name, seed)
    code, said, card = call(data, "--data.path", r2gen, "--data.format", "r2gen", *CARD)
    if code:
        assert str(r2gen) in said
    elif name == "annotation.json":
        tree = json.loads((r2gen / name).read_text(encoding="utf-8-sig"))
        assert [sum(pair) for pair in counts(card)] == [len(tree[split]) for split in ("train", "val", "test")]
    else:
        assert counts(card) == [(4, 0)] * 3


@pytest.mark.parametrize("seed", seeds(10))
@pytest.mark.parametrize("name", ["0/0.png", "1/0.jpg", "2/deep.png", "3/0.dcm"])
def test_images(r2gen, call, name, seed):
    """What the check of a data set passes is a study or one line when it is read."""
    damage(r2gen / "images" / name, seed)
    code, said, card = call(data, "--data.path", r2gen, "--data.format", "r2gen", *CARD)
    assert code == 0 and [sum(pair) for pair in counts(card)] == [4, 4, 4], said
    code, said, _ = call(evaluate, "--image", r2gen / "images" / name, "--run", r2gen)
    assert code == 1 and (name in said or "no trained policy" in said)


@pytest.fixture
def openi(tmp_path) -> Path:
    folder = tmp_path / "openi"
    (folder / "ecgen-radiology").mkdir(parents=True)
    for uid in (1, 2, 3):
        picture(folder / "images" / f"CXR{uid}_IM-000{uid}-1001.png")
        (folder / "ecgen-radiology" / f"{uid}.xml").write_text(
            f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><uId id="CXR{uid}"/><Abstract>'
            '<AbstractText Label="FINDINGS">The heart is normal.</AbstractText>'
            '<AbstractText Label="IMPRESSION">No disease.</AbstractText></Abstract>'
            f'<parentImage id="CXR{uid}_IM-000{uid}-1001"/></eCitation>\n'
        )
    rows = [{"uid": uid, "file": f"CXR{uid}_IM-000{uid}-1001.png", "view_seen": "frontal"} for uid in (1, 2, 3)]
    (folder / "images" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("seed", seeds(12))
@pytest.mark.parametrize("name", ["ecgen-radiology/2.xml", "images/pairs.jsonl"])
def test_openi(openi, call, name, seed):
    damage(openi / name, seed)
    code, said, card = call(data, "--data.path", openi, "--data.format", "openi")
    assert str(openi) in said if code else [sum(pair) for pair in counts(card)] == [3]


def write_csv(path: Path, *rows: tuple) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue())


@pytest.fixture
def kaggle(tmp_path) -> Path:
    folder = tmp_path / "kaggle"
    for uid in (1, 2, 3):
        picture(folder / "images" / f"{uid}_IM-000{uid}-1001.dcm.png")
    write_csv(folder / "indiana_reports.csv", ("uid", "MeSH", "findings", "impression"),
              *((uid, "normal", "The heart is normal, as before.", "No disease.") for uid in (1, 2, 3)))  # fmt: skip
    write_csv(folder / "indiana_projections.csv", ("uid", "filename", "projection"),
              *((uid, f"{uid}_IM-000{uid}-1001.dcm.png", "Frontal") for uid in (1, 2, 3)))  # fmt: skip
    return folder


@pytest.mark.parametrize("seed", seeds(12))
@pytest.mark.parametrize("name", ["indiana_reports.csv", "indiana_projections.csv"])
def test_kaggle(kaggle, call, name, seed):
    damage(kaggle / name, seed)
    code, said, card = call(data, "--data.path", kaggle, "--data.format", "kaggle")
    if code:
        assert str(kaggle) in said
    else:
        text = (kaggle / "indiana_reports.csv").read_text(encoding="utf-8-sig")
        assert [sum(pair) for pair in counts(card)] == [len(list(csv.DictReader(io.StringIO(text))))]


@pytest.fixture
def mimic(tmp_path) -> Path:
    folder = tmp_path / "mimic"
    split, views = [("dicom_id", "study_id", "subject_id", "split")], [("dicom_id", "ViewPosition")]
    for i, name in enumerate(("train", "validate", "test", "train")):
        home = folder / "files" / "p10" / f"p1000000{i}"
        picture(home / f"s5000000{i}" / f"d{i}.jpg")
        (home / f"s5000000{i}.txt").write_text(f" FINAL REPORT\n FINDINGS:\n Clear {i}.\n\n IMPRESSION:\n Normal.\n")
        split.append((f"d{i}", f"5000000{i}", f"1000000{i}", name))
        views.append((f"d{i}", "PA"))
    write_csv(folder / "mimic-cxr-2.0.0-split.csv", *split)
    write_csv(folder / "mimic-cxr-2.0.0-metadata.csv", *views)
    return folder


@pytest.mark.parametrize("seed", seeds(10))
@pytest.mark.parametrize("name", ["mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv",
                                  "files/p10/p10000000/s50000000.txt"])  # fmt: skip
def test_mimic(mimic, call, name, seed):
    damage(mimic / name, seed)
    code, said, card = call(data, "--data.path", mimic, "--data.format", "mimic")
    if code:
        assert str(mimic) in said
    elif "split" not in name:
        assert [sum(pair) for pair in counts(card)] == [2, 1, 1]


TOML = """stage = "1"
seed = 3
[data]
path = "r2gen"
format = "r2gen"
limit = 2
[grpo]
lr = 1e-5
batch_size = 4
[eval]
bootstrap = 50
"""


@pytest.mark.parametrize("seed", seeds(24))
def test_toml(r2gen, call, seed, monkeypatch):
    monkeypatch.chdir(r2gen.parent)
    path = r2gen.parent / "own.toml"
    path.write_text(TOML)
    if seed % 3:
        damage(path, seed)
    else:  # a value of another kind
        rng = random.Random(seed)
        odd = rng.choice(["0", "-1", "true", '"x"', "nan", "inf", "[]", "{}", "1979-05-27", "1_000_000_000_000", '""'])
        lines = TOML.splitlines()
        at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
        lines[at] = f"{lines[at].split('=')[0]}= {odd}"
        path.write_text("\n".join(lines))
    code, said, card = call(data, "--config", path, *CARD)
    if code:
        assert "own.toml" in said or "config:" in said or "data.path" in said or str(path.parent) in said
    else:
        cfg = tomllib.loads(path.read_text(encoding="utf-8-sig")).get("data", {})
        assert len(counts(card)) == 3 or cfg.get("path") != "r2gen"


@pytest.fixture
def predictions(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("shutil.which", lambda name: None)  # METEOR's Java takes a second
    rows = [{"id": f"s{i}", "report": REPORT} for i in range(4)]
    (tmp_path / "ours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [row | {"labels": ["effusion_left"]} for row in rows]
    (tmp_path / "references.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(evaluate, "resolve", lambda cfg, needs: cfg)
    monkeypatch.setattr("evidence.judge.load_scorers", lambda *a, **k: SimpleNamespace(
        label=lambda texts: np.zeros((len(texts), 14), bool), bertscore=lambda c, r: [0.5] * len(c),
        radgraph=lambda c, r: [0.5] * len(c)))  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("seed", seeds(12))
@pytest.mark.parametrize("name", ["ours.jsonl", "references.jsonl"])
def test_predictions(predictions, call, name, seed):
    damage(predictions / name, seed)
    flags = ("--predictions", predictions / "ours.jsonl", "--references", predictions / "references.jsonl")
    code, said, out = call(evaluate, *flags, "--eval.bootstrap", "20", "--device", "cpu")
    if code:
        assert str(predictions) in said
    else:
        rows = (predictions / "references.jsonl").read_text(encoding="utf-8-sig").split("\n")
        assert f"{sum(bool(row.strip()) for row in rows)} studies" in out


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    """A run with a finished Stage 0 and its checkpoint."""
    cfg = replace(micro, stage="0", run=str(tmp_path_factory.mktemp("trained")), sft=replace(micro.sft, steps=2))
    train.train(resolve(cfg))
    return cfg


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained.run, tmp_path / "run"))


ADAPTER = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/trainer_state.json",
           "config.json"]  # fmt: skip


@pytest.mark.parametrize("seed", seeds(6))
@pytest.mark.parametrize("name", ADAPTER)
def test_adapters(run, r2gen, call, name, seed):
    """A damaged policy writes no report: its own words, or a line."""
    damage(run / "sft" / name, seed)
    code, said, _ = call(evaluate, "--image", r2gen / "images" / "0" / "0.png", "--run", run, "--policy", "sft",
                         "--device", "cpu")  # fmt: skip
    assert not code or str(run) in said or "config:" in said, said


@pytest.mark.parametrize("seed", seeds(6))
@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "config.json"])
def test_a_stage_goes_on_from_damaged_files(run, trained, call, monkeypatch, name, seed):
    """... bit by bit as before, or says which file to delete."""
    from safetensors.torch import load_file

    whole = load_file(run / "sft" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "sft" / "adapter")
    damage(run / "sft" / name, seed)
    cfg = replace(trained, run=str(run))
    asked = train.TrainRun(**{field.name: getattr(cfg, field.name) for field in fields(cfg)})
    monkeypatch.setattr(train, "parse", lambda *args: asked)
    code, said, _ = call(train)
    if code:
        assert str(run / "sft") in said, said
    else:
        found = load_file(run / "sft" / "adapter" / "adapter_model.safetensors")
        assert all((found[key] == whole[key]).all() for key in whole)


@pytest.mark.parametrize("seed", seeds(8))
@pytest.mark.parametrize("name", ["results.json", "stats.npz", "reports.jsonl"])
def test_comparisons(tmp_path, call, name, seed):
    for policy in ("a", "b"):
        folder = tmp_path / "run" / "eval" / "test" / policy
        folder.mkdir(parents=True)
        settings = {"split": "test", "n": 3, "seed": 0, "eval": {"bootstrap": 50}}
        (folder / "results.json").write_text(json.dumps({"policy": policy, "settings": settings}))
        (folder / "reports.jsonl").write_text("\n".join(json.dumps({"id": f"s{i}"}) for i in range(3)))
        stats = {f"greedy/{family}": np.ones((3, 2)) for family in ("length", "rouge_l")}
        np.savez_compressed(folder / "stats.npz", **stats)
    damage(folder / name, seed)
    code, said, out = call(evaluate, "--compare", tmp_path / "run" / "a", tmp_path / "run" / "b")
    assert "/b" in said if code else "paired over 3 studies" in out
