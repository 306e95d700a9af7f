"""RaTEScore, with a stand-in for the package in a real environment of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_rewards import ODD

from evidence import metrics
from scorers.ratescore import load_ratescore

RUNNER = Path(__file__).parents[1] / "scorers" / "ratescore.py"
# scores the share of the reference's words; like the real package, drops a text that has no sentence
PACKAGE = """
from .utils import sentence_split
class RaTEScore:
    def __init__(self, use_gpu):
        assert use_gpu is False
        print('loading')
    def compute_score(self, candidates, references):
        c, r = sentence_split(candidates)[0], sentence_split(references)[0]
        assert r != ["broken"], "cannot read this"
        return [len({*a.split()} & {*b.split()}) / len({*b.split()}) for a, b in zip(c, r)]
"""
UTILS = """
def sentence_split(texts):
    kept = [text for text in texts if len(text.strip()) > 2]
    return kept, [1] * len(kept)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment with the stand-in and no other package."""
    folder = tmp_path_factory.mktemp("ratescore")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    (packages / "RaTEScore").mkdir()
    (packages / "RaTEScore" / "__init__.py").write_text(PACKAGE)
    (packages / "RaTEScore" / "utils.py").write_text(UTILS)
    return str(folder / "bin" / "python")


def test_scores_come_back_in_order_and_texts_without_a_sentence_score_0(python):
    score = load_ratescore(python)
    candidates = ["left effusion", "", "ßharp “quotes”\nand lines\u2028here", "1.", "right effusion"]
    references = ["left effusion", "clear", candidates[2], "clear lungs", "left effusion"]
    assert score(candidates, references) == [1.0, 0.0, 1.0, 0.0, 0.5]
    stats = metrics.collect([[c] for c in candidates], references, ratescore=score)
    assert metrics.summarise({"row": stats}, (), 20, 0)["row"]["ratescore"]["value"] == pytest.approx(0.5)


def test_it_runs_from_any_folder_whatever_the_package_prints(python, tmp_path):
    rows = [["left\u2028effusion", "left effusion"], ["clear", "clear lungs"]]
    ran = subprocess.run([python, "-I", str(RUNNER)], input=json.dumps(rows), cwd=tmp_path, capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert ran.stdout.splitlines() == ["loading", "[1.0, 0.5]"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interpreter", ["nowhere/python", sys.executable, "/bin/true", "/bin/echo"])
def test_no_environment_is_one_line_at_the_start(interpreter):
    with pytest.raises(ValueError, match="eval.ratescore: ") as error:
        load_ratescore(interpreter)
    assert interpreter in str(error.value) and "\n" not in str(error.value)


def test_a_failure_inside_is_one_line(python):
    with pytest.raises(ValueError, match="eval.ratescore: no RaTEScore from .*cannot read this.*set it up") as error:
        load_ratescore(python)(["left effusion"], ["broken"])
    assert "\n" not in str(error.value)


def test_an_answer_that_is_none_is_one_line(python, monkeypatch, tmp_path):
    score = load_ratescore(python)
    (tmp_path / "silent.py").write_text("print('loading')")
    monkeypatch.setattr("scorers.ratescore.__file__", str(tmp_path / "silent.py"))
    with pytest.raises(ValueError, match="eval.ratescore: no RaTEScore from .*its answer cannot be read.*set it up"):
        score(["left effusion"], ["left effusion"])


def test_odd_texts_score_0_and_end_nothing(python):
    silent = [text for text in ODD if not any(map(str.isalnum, text))]
    assert load_ratescore(python)([*silent, "left effusion"], ["left effusion"] * (len(silent) + 1)) == [
        *[0.0] * len(silent), 1.0]  # fmt: skip
    assert len(load_ratescore(python)(ODD, ["left effusion"] * len(ODD))) == len(ODD)
