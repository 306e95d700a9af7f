"""The judge of an evaluation: holds reports against references and, on the phantom, against the exact truth."""

from dataclasses import dataclass

from config import Config, to_dict
from evidence import metrics, reader
from evidence.meteor import Meteor
from rewards import format_reward, strip_tags, unwrap
from running.parallel import pick_device
from scorers.chexbert import CHEXPERT_LABELS
from scorers.green import load_green
from scorers.load import load_scorers
from scorers.ratescore import load_ratescore


@dataclass
class Wanted:
    """What n reports are held against."""

    source: str  # a split, or a file of references
    ids: list[str]
    references: list[str]
    labels: list[list[str]] | None  # exact labels of each image, where they are known


class Judge:
    """Statistics (metrics.collect's) and their summaries of one row of reports after another.

    with_scorers: by CheXbert, RadGraph and BERTScore too. tagged: by the format reward too.
    """

    def __init__(self, cfg: Config, wanted: Wanted, with_scorers: bool = True, tagged: bool = True):
        self.cfg, self.wanted, self.tagged, device = cfg, wanted, tagged, pick_device(cfg.device)
        self.meteor, self.quick, self.costly = Meteor(), {}, {}
        if with_scorers:
            frozen = load_scorers(cfg, device, with_expert=False)
            self.quick = {"label": frozen.label, "bertscore": frozen.bertscore, "radgraph": frozen.radgraph}
        if cfg.eval.green:
            self.costly["green"] = load_green(cfg.eval.green, device)
        if cfg.eval.ratescore:
            self.costly["ratescore"] = load_ratescore(cfg.eval.ratescore)

    def score(self, outputs: list[list[str]], row: str) -> dict:
        """Statistics of raw outputs [study][sample] for the row greedy, sampled, shuffled or template.

        METEOR takes a millisecond a report and leaves out the many samples; GREEN's and RaTEScore's models, hours for
        some, judge greedy reports alone.
        """
        scorers = self.quick | (self.costly if row == "greedy" else {})
        texts, formats = [[strip_tags(output) for output in group] for group in outputs], None
        if self.tagged and row != "template":
            formats = [format_reward(group, self.cfg.rewards.required_sections) for group in outputs]
        return metrics.collect(texts, self.wanted.references, formats=formats, labels=self.wanted.labels,
                               meteor=None if row == "sampled" else self.meteor, **scorers)  # fmt: skip

    def summarise(self, stats: dict[str, dict]) -> dict[str, dict]:
        """{row: metrics.summarise of its statistics}."""
        resamples, seed = self.cfg.eval.bootstrap, self.cfg.seed
        return {row: metrics.summarise(values, CHEXPERT_LABELS, resamples, seed) for row, values in stats.items()}


def describe(cfg: Config, wanted: Wanted) -> dict:
    """The settings that numbers must share to stand in one table."""
    plain = to_dict(cfg)
    fields = {"data": ("path", "format", "target", "prompt", "views"), "model": ("path", "dtype", "max_pixels"),
              "eval": ("samples", "bootstrap", "green")}  # fmt: skip
    parts = {table: {name: plain[table][name] for name in names} for table, names in fields.items()}
    parts["scorers"] = {name: value for name, value in plain["scorers"].items() if name != "expert"}  # no metric's
    if not cfg.eval.green:
        del parts["eval"]["green"]
    sections = plain["rewards"]["required_sections"]  # of the format rate
    return {"split": wanted.source, "n": len(wanted.ids), "seed": cfg.seed, "rollout": plain["rollout"],
            "required_sections": sections, **parts}  # fmt: skip


def report_rows(wanted: Wanted, greedy: list[list[str]], sampled: list[list[str]] | None) -> list[dict]:
    """Rows of reports.jsonl: what was written, what the image shows, what the reader understood as stated."""
    rows = []
    for i, (study_id, reference, [output]) in enumerate(zip(wanted.ids, wanted.references, greedy, strict=True)):
        row = {"id": study_id, "reference": reference, "report": strip_tags(output)}
        row["tagged"] = unwrap(output) is not None
        if sampled is not None:
            row["samples"] = [strip_tags(sample) for sample in sampled[i]]
        if wanted.labels is not None:
            stated = reader.read_report(row["report"]).stated
            row["labels"] = wanted.labels[i]
            row["stated"] = sorted(f"{name}_{side}" if side else name for name, side in stated)
        rows.append(row)
    return rows
