"""The judge of an evaluation: holds reports against references and, on the phantom, against the exact truth."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, to_dict
from data import Study
from evidence import metrics
from evidence.findings import read_findings
from evidence.meteor import Meteor
from evidence.reader import label_of, read_report
from evidence.tables import save
from rewards import format_reward, strip_tags, unwrap
from running.parallel import pick_device
from scorers.chexbert import CHEXPERT_LABELS
from scorers.green import load_green
from scorers.load import load_scorers
from scorers.ratescore import load_ratescore

Outputs = list[list[str]]  # raw outputs [study][sample]
MANY = 5000  # studies above which METEOR, a millisecond a report, leaves out the rows that need no eyes


@dataclass
class Wanted:
    """What n reports are held against."""

    source: str  # a split, or a file of references
    ids: list[str]
    references: list[str]
    labels: list[list[str]] | None  # exact or gold labels of each image, where they are known

    @classmethod
    def of(cls, split: str, studies: list[Study]) -> "Wanted":
        labels = None if studies[0].labels is None else [study.labels for study in studies]
        return cls(split, [study.id for study in studies], [study.report for study in studies], labels)


class Judge:
    """Statistics (metrics.collect's) and their summaries of one row of reports after another.

    without: flags of scorers.load.may_judge. tagged: outputs carry <report> tags; else they are scored as they are.
    """

    def __init__(self, cfg: Config, wanted: Wanted, without: Collection[str] = (), tagged: bool = True):
        self.cfg, self.wanted, self.tagged, self.meteor = cfg, wanted, tagged, Meteor()
        self.gold = bool(cfg.data.labels and wanted.labels)
        device = pick_device(cfg.device)
        frozen = load_scorers(cfg, device, with_expert=False, without=without)
        self.quick, self.costly = {name: scorer for name, scorer in vars(frozen).items() if scorer}, {}
        if cfg.eval.green:
            self.costly["green"] = load_green(cfg.eval.green, device)
        if cfg.eval.ratescore:
            self.costly["ratescore"] = load_ratescore(cfg.eval.ratescore)

    def always(self, template: str) -> dict[str, dict]:
        """The rows that stand beside any policy's: the fixed normal template and, with gold labels, the references
        themselves, in which the reader finds no more than it can."""
        rows = {"template": self.score([[template]] * len(self.wanted.ids), "template")}
        if self.gold:
            rows["references"] = self.score([[text] for text in self.wanted.references], "template")
        return rows

    def rows(self, greedy: Outputs, sampled: Outputs | None, other: Sequence[int] = ()) -> dict[str, dict]:
        """Statistics by row of a policy's reports and, as `shuffled`, of those given to other studies: study i gets
        those of other[i]. A greedy report hangs on its image alone, so this swaps the images."""
        written = {"greedy": greedy, "sampled": sampled, "shuffled": [greedy[i] for i in other]}
        if sampled and self.gold:
            written["shuffled_sampled"] = [sampled[i] for i in other]
        stats = {row: self.score(outputs, row) for row, outputs in written.items() if outputs}
        if "shuffled_sampled" in stats:
            both = [stats[row]["truth"] for row in ("sampled", "shuffled_sampled")]
            stats["sampled"]["looked"] = np.concatenate(both, axis=1)  # (n, 16)
        return stats

    def notes(self) -> list[str]:
        """What the tables must say of METEOR and of the truth."""
        many = f"METEOR of the greedy reports alone, as there are more than {MANY:,} studies"
        gold = ("Truth: gold labels, counted by finding without sides, as `sided F1` too. The row `references` tells "
                "how well the rules read: the others' ceiling.")  # fmt: skip
        return [*filter(None, (self.meteor.note, many * (len(self.wanted.ids) > MANY), gold * self.gold))]

    def text(self, output: str) -> str:
        """What is scored of an output."""
        return strip_tags(output) if self.tagged else output

    def score(self, outputs: Outputs, row: str) -> dict:
        """Statistics of outputs for the row greedy, sampled, shuffled, shuffled_sampled or template.

        Samples are held against the truth alone where it is known: that is all that the tables show of them, and the
        models that label and compare texts would have eight times as many to read. METEOR leaves out the many samples;
        GREEN's and RaTEScore's models, hours for some, judge greedy reports alone.
        """
        scorers, formats = self.quick | (self.costly if row == "greedy" else {}), None
        scorers = {} if "sampled" in row and self.wanted.labels is not None else scorers
        if row == "greedy" or "sampled" not in row and len(outputs) <= MANY:
            scorers["meteor"] = self.meteor
        if self.tagged and row != "template":
            formats = [format_reward(group, self.cfg.rewards.required_sections) for group in outputs]
        texts = [[self.text(output) for output in group] for group in outputs]
        return metrics.collect(texts, self.wanted.references, protocol=self.cfg.eval.protocol, formats=formats,
                               labels=self.wanted.labels, gold=self.gold, **scorers)  # fmt: skip

    def save(self, folder: Path, about: dict, greedy: Outputs, sampled: Outputs | None, stats: dict[str, dict]) -> None:
        """Write what the policy that `folder` is called after wrote, and its statistics by row; about: tables.Result's
        other fields."""
        result = {"policy": folder.name, "adapter": "", "settings": describe(self.cfg, self.wanted)}
        result |= {"notes": self.notes()} | about
        result |= metrics.summarise(stats, CHEXPERT_LABELS, self.cfg.eval.bootstrap, self.cfg.seed)
        save(folder, result, self.report_rows(greedy, sampled), stats)

    def report_rows(self, greedy: Outputs, sampled: Outputs | None) -> list[dict]:
        """Rows of reports.jsonl: what was written, what the image shows, what the reader understood as stated."""
        wanted, rows = self.wanted, []
        for i, (key, reference, [output]) in enumerate(zip(wanted.ids, wanted.references, greedy, strict=True)):
            row = {"id": key, "reference": reference, "report": self.text(output), "tagged": unwrap(output) is not None}
            if sampled is not None:
                row["samples"] = [self.text(sample) for sample in sampled[i]]
            if wanted.labels is not None:
                reading = (read_findings if self.gold else read_report)(row["report"])
                row |= {"labels": wanted.labels[i], "stated": sorted(map(label_of, reading.stated))}
            rows.append(row)
        return rows


def describe(cfg: Config, wanted: Wanted) -> dict:
    """The settings that numbers must share to stand in one table."""
    plain = to_dict(cfg)
    fields = {"data": ("path", "format", "target", "prompt", "views", "labels"),
              "eval": ("samples", "bootstrap", "green", "protocol"),
              "model": ("path", "dtype", "max_pixels")}  # fmt: skip
    unused = {"labels": "", "green": "", "protocol": "raw"}  # which older evaluations did not know: not named
    parts = {table: {name: plain[table][name] for name in names if plain[table][name] != unused.get(name)}
             for table, names in fields.items()}  # fmt: skip
    scorers = plain["scorers"] | ({"radgraph": "rules"} if cfg.scorers.radgraph == "auto" else {})
    del scorers["expert"]  # no metric's
    return {"split": wanted.source, "n": len(wanted.ids), "seed": cfg.seed, "rollout": plain["rollout"],
            "required_sections": plain["rewards"]["required_sections"],  # of the format rate
            **parts, "scorers": scorers}  # fmt: skip
