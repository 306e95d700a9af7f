"""The frozen scorers that a config names, loaded and put behind the interface of rewards.Scorers."""

from functools import partial

from config import Config
from rewards import Scorers
from scorers.bertscore import load_bertscore
from scorers.chexbert import load_chexbert
from scorers.expert import load_expert
from scorers.radgraph_rules import rule_radgraph


def load_scorers(cfg: Config, device="cpu", with_expert: bool = True) -> Scorers:
    """Load the frozen scorers that `cfg.scorers` names; this is the one place that knows them all."""
    s = cfg.scorers
    if s.radgraph == "rules":
        radgraph = partial(rule_radgraph, level=s.radgraph_level)
    else:
        from scorers.radgraph_model import PackageRadGraph  # here, as it brings all of AllenNLP: seconds

        radgraph = PackageRadGraph(s.radgraph, s.radgraph_dir, s.radgraph_level, device)
    bertscore = load_bertscore(s.bertscore, s.bertscore_layer, device, s.bertscore_baseline)
    similarity = load_expert(s.expert, device).similarity if with_expert else None
    return Scorers(load_chexbert(s.chexbert, s.bert, device), bertscore, radgraph, similarity)
