"""Which scorers a config names, and which of them may judge what."""

from dataclasses import replace

import pytest

from config import Config, DataConfig, ModelConfig, ScorerConfig
from phantom.cache import resolve
from scorers import load

FLAGS = ["--scorers.chexbert", "--scorers.bert", "--scorers.bertscore", "--scorers.expert", "--scorers.radgraph"]
REAL = Config(data=DataConfig(path="data/iu"), model=ModelConfig(path="org/model"))


def test_the_phantoms_scorers_judge_the_phantom_alone(tmp_path, monkeypatch):
    assert load.may_judge(Config()) == load.may_judge(resolve(Config(assets_dir=str(tmp_path)))) == []
    assert load.may_judge(REAL) == load.may_judge(resolve(REAL)) == FLAGS
    assert load.may_judge(REAL, with_expert=False) == [flag for flag in FLAGS if "expert" not in flag]
    assert load.may_judge(Config(), on_phantom=False) == FLAGS and load.may_judge(REAL, on_phantom=True) == []
    smoke = replace(REAL, model=ModelConfig())  # the phantom's policy on real images: nobody takes it for a result
    assert load.may_judge(smoke) == []
    (tmp_path / "truth.jsonl").write_text("")  # a copy of the phantom's data set
    assert load.may_judge(replace(REAL, data=DataConfig(path=str(tmp_path)))) == []
    labeller = tmp_path / "assets" / "phantom-0123abcd" / "labeller"
    labeller.mkdir(parents=True)
    (tmp_path / "bert").symlink_to(labeller)
    monkeypatch.chdir(tmp_path)
    for path in ("bert", "assets/phantom-0123abcd/labeller", "phantom:labeller"):
        assert "--scorers.bert" in load.may_judge(replace(REAL, scorers=ScorerConfig(bert=path)))


def test_what_was_given_may_judge():
    given = {"chexbert": "hf-hub:o/r/c.pth", "bert": "bert-base-uncased", "bertscore": "roberta-large",
             "expert": "models/phantom-like/expert", "radgraph": "rules"}  # fmt: skip
    for name in given:
        cfg = replace(REAL, scorers=ScorerConfig(**{name: given[name]}))
        assert load.may_judge(cfg) == [flag for flag in FLAGS if flag != f"--scorers.{name}"]
    assert load.may_judge(replace(REAL, scorers=ScorerConfig(**given))) == []


@pytest.mark.parametrize("flag, name", [("chexbert", "label"), ("bert", "label"), ("bertscore", "bertscore"),
                                        ("radgraph", "radgraph")])  # fmt: skip
def test_only_the_others_are_loaded(monkeypatch, flag, name):
    for loader in ("load_chexbert", "load_bertscore"):
        monkeypatch.setattr(load, loader, lambda *args: args)
    scorers = vars(load.load_scorers(Config(), with_expert=False, without=[f"--scorers.{flag}"]))
    assert [key for key, scorer in scorers.items() if scorer is None] == [name, "similarity"]
    assert None not in list(vars(load.load_scorers(Config(), with_expert=False)).values())[:3]
