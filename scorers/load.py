"""The frozen scorers that a config names, loaded and put behind the interface of rewards.Scorers."""

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from config import Config
from rewards import Scorers
from scorers.bertscore import load_bertscore
from scorers.chexbert import load_chexbert
from scorers.expert import load_expert, with_errors
from scorers.radgraph_rules import rule_radgraph


def may_judge(cfg: Config, with_expert: bool = True, on_phantom: bool | None = None) -> list[str]:
    """The flags that still name the phantom's scorers, which know its own reports and images alone; [] = all may judge.

    on_phantom: are the phantom's reports judged? None: yes where data set or policy are its own (a smoke run on real
    images has its policy). RadGraph's rules judge real reports only where `scorers.radgraph = rules` says so.
    """

    def own(path: str) -> bool:  # by its name, as phantom:base, or by its place among the assets
        return bool(re.search(r"/phantom(:|-[0-9a-f]{8}(/|$))", str(Path(path).resolve())))

    if on_phantom is None:
        on_phantom = own(cfg.data.path) or own(cfg.model.path) or Path(cfg.data.path, "truth.jsonl").exists()
    names = ["chexbert", "bert", "bertscore", *["expert"] * with_expert]
    flags = [f"--scorers.{name}" for name in names if own(getattr(cfg.scorers, name))]
    return [] if on_phantom else flags + ["--scorers.radgraph"] * (cfg.scorers.radgraph == "auto")


def load_scorers(cfg: Config, device="cpu", with_expert: bool = True, without: Collection[str] = ()) -> Scorers:
    """Load the frozen scorers that `cfg.scorers` names, but those that `without`, may_judge's flags, names: None."""
    s, label, bertscore, radgraph = cfg.scorers, None, None, None
    if not {"--scorers.chexbert", "--scorers.bert"} & {*without}:
        label = load_chexbert(s.chexbert, s.bert, device)
    if "--scorers.bertscore" not in without:
        bertscore = load_bertscore(s.bertscore, s.bertscore_layer, device, s.bertscore_baseline)
    if s.radgraph not in ("auto", "rules"):
        from scorers.radgraph_model import PackageRadGraph  # here, as it brings all of AllenNLP: seconds

        radgraph = PackageRadGraph(s.radgraph, s.radgraph_dir, s.radgraph_level, device)
    elif "--scorers.radgraph" not in without:
        radgraph = partial(rule_radgraph, level=s.radgraph_level)
    similarity = with_errors(load_expert(s.expert, device).similarity, s.expert_noise) if with_expert else None
    return Scorers(label, bertscore, radgraph, similarity)
