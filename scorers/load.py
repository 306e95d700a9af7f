"""The frozen scorers that a config names, loaded and put behind the interface of rewards.Scorers."""

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from config import Config
from rewards import Scorers
from scorers.bertscore import load_bertscore
from scorers.chexbert import load_chexbert
from scorers.expert import load_expert
from scorers.radgraph_rules import rule_radgraph


def is_phantom(path: str) -> bool:
    """Is it one of the phantom's assets, by its name (`phantom:base`) or by its place among them?"""
    return bool(re.search(r"/phantom(:|-[0-9a-f]{8}(/|$))", str(Path(path).resolve())))


def may_judge(cfg: Config, with_expert: bool = True, on_phantom: bool | None = None) -> list[str]:
    """The flags that still name the phantom's scorers, which know its own reports and images alone; [] = all may judge.

    on_phantom: is it the phantom's reports that are judged? None: they are where the data set is the phantom's (or has
    exact labels as it), or the policy is, as in a smoke run on real images. RadGraph's rules judge real reports only
    where `scorers.radgraph = rules` says so.
    """
    if on_phantom is None:
        own = is_phantom(cfg.data.path) or is_phantom(cfg.model.path)
        on_phantom = own or Path(cfg.data.path, "truth.jsonl").exists()
    names = ["chexbert", "bert", "bertscore", *["expert"] * with_expert]
    flags = [f"--scorers.{name}" for name in names if is_phantom(getattr(cfg.scorers, name))]
    return [] if on_phantom else flags + ["--scorers.radgraph"] * (cfg.scorers.radgraph == "auto")


def load_scorers(cfg: Config, device="cpu", with_expert: bool = True, without: Collection[str] = ()) -> Scorers:
    """Load the frozen scorers that `cfg.scorers` names; this is the one place that knows them all.

    without: may_judge's flags; a scorer that one of them names is None.
    """
    s, radgraph, bertscore, label = cfg.scorers, None, None, None
    if "--scorers.radgraph" in without:
        pass
    elif s.radgraph in ("auto", "rules"):
        radgraph = partial(rule_radgraph, level=s.radgraph_level)
    else:
        from scorers.radgraph_model import PackageRadGraph  # here, as it brings all of AllenNLP: seconds

        radgraph = PackageRadGraph(s.radgraph, s.radgraph_dir, s.radgraph_level, device)
    if "--scorers.bertscore" not in without:
        bertscore = load_bertscore(s.bertscore, s.bertscore_layer, device, s.bertscore_baseline)
    if not {"--scorers.chexbert", "--scorers.bert"} & {*without}:
        label = load_chexbert(s.chexbert, s.bert, device)
    return Scorers(label, bertscore, radgraph, load_expert(s.expert, device).similarity if with_expert else None)
