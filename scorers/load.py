"""The frozen scorers that a config names, loaded and put behind the interface of rewards.Scorers."""

from config import Config
from rewards import Scorers
from scorers import clinical
from scorers.expert import load_expert


def load_scorers(cfg: Config, device="cpu", with_expert: bool = True) -> Scorers:
    """Load the frozen scorers that `cfg.scorers` names."""
    s = cfg.scorers
    labeller = clinical.load_chexbert(s.chexbert, s.bert, device)
    if s.radgraph == "rules":
        radgraph = clinical.RuleRadGraph(s.radgraph_level)
    else:
        from scorers.radgraph_model import PackageRadGraph  # here, as it brings all of AllenNLP: seconds

        radgraph = PackageRadGraph(s.radgraph, s.radgraph_dir, s.radgraph_level, device)
    bertscore = clinical.load_bertscore(s.bertscore, s.bertscore_layer, device, s.bertscore_baseline)
    similarity = None
    if with_expert:
        frozen = load_expert(s.expert, device)

        def similarity(images, ids, groups):
            texts = [text for group in groups for text in group]
            return frozen.similarity(images, ids, texts, len(groups[0])).float().cpu()

    return Scorers(labeller, bertscore, lambda c, r: radgraph(hyps=c, refs=r)[1], similarity)
