"""The result tables: one results.json per policy in, one table over all of them out, for terminal and Markdown."""

import io
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tabulate
from pydantic import BaseModel, ValidationError

from evidence.metrics import MEASURES, WIDTHS
from evidence.protocols import NOTES
from formats.files import read_json
from running.folder import lock, write_bytes, write_text
from running.weights import check_zip

tabulate.MIN_PADDING = 0  # no column is wider than what stands in it
SHOWN = tomllib.loads(Path(__file__).with_name("columns.toml").read_text(encoding="utf-8"))


class Settings(BaseModel, extra="allow"):
    """judge.describe's, as far as they are read again."""

    seed: int
    n: int  # studies
    split: str
    eval: dict[str, str | int] = {}


Number = int | float | None
Summary = dict[str, int | dict[str, Number | dict[str, Number]]]  # a row of metrics.summarise


class Result(BaseModel, extra="allow"):
    """A policy's results.json, as evaluate.py makes it."""

    settings: Settings
    policy: str = ""
    shuffled_as: str = ""  # what the table calls the row of images, or references, given to other studies
    notes: list[str] = []
    template: Summary = {}
    references: Summary = {}  # themselves, with gold labels: what the rules can read
    greedy: Summary = {}
    sampled: Summary = {}
    shuffled: Summary = {}
    shuffled_sampled: Summary = {}
    forced_choice: dict[str, float] = {}


def read_result(path: Path) -> dict:
    """A policy's results.json; ValueError, one line, for one that is damaged or of another version."""
    try:
        return Result.model_validate(read_json(path), strict=True).model_dump()
    except ValidationError as error:
        place, said = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise ValueError(f"{path}: {place}: {said}; evaluate this policy again") from None


def read_policy(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The settings of a policy's results.json, and the stats.npz beside it, {"<row>/<family>": (n, k)}; ValueError for
    one that is damaged or of another version."""
    settings, path = read_result(path)["settings"], path.with_name("stats.npz")
    try:
        check_zip(path)  # else np.load might take it for a pickle or a single array
        stats = dict(np.load(path, allow_pickle=False))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error}); evaluate this policy again") from None
    for name, values in stats.items():
        family = name.split("/")[-1]  # the width of `levels` hangs on the number of samples
        shape = (settings["n"], values.shape[-1] if family == "levels" and values.ndim else WIDTHS.get(family, 2))
        if values.shape != shape or values.dtype.kind != "f":
            raise ValueError(f"{path}: '{name}' is no {shape[0]} x {shape[1]} numbers; evaluate this policy again")
    return settings, stats


@dataclass(frozen=True)
class Column:
    """A number as the tables show it; columns.toml has all of them and says what the fields mean."""

    title: str
    key: str
    where: str
    factor: int = 100
    reward: str = ""

    @property
    def flat(self) -> str:
        return self.title.replace("-\n", "").replace("\n-", "-").replace("\n", " ")

    def entry(self, row: dict) -> dict:
        """{"value", "lo", "hi"} in a row {"greedy": {metric: entry}, "sampled": ...} of the results; {} without."""
        part, metric = self.key.split("/")
        return row.get(part, {}).get(metric, {})

    def star(self, weights: dict) -> str:
        """"*" where `weights`, the settings `rewards`, make this a reward too, else ""."""
        return "*" * (self.reward > "" and all(map(weights.get, self.reward.split())))


def columns(where: str) -> list[Column]:
    """The columns of the table called `where`."""
    return [column for column in (Column(**fields) for fields in SHOWN["columns"]) if where in column.where.split()]


def save(folder: Path, result: dict, reports: list[dict], stats: dict[str, dict]) -> None:
    """Write one policy's results.json, reports.jsonl and stats.npz, each whole or not at all.

    stats.npz holds metrics.collect's arrays, (n studies, k) under "<row>/<family>": what compare.py resamples. An old
    results.json goes first and the new one comes last: where it is, the files belong together.
    """
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **{f"{row}/{name}": array for row in stats for name, array in stats[row].items()})
    with lock(folder.parent / ".lock", wait=True):
        (folder / "results.json").unlink(missing_ok=True)
        write_bytes(folder / "stats.npz", arrays.getbuffer())
        # ASCII, as a report may hold U+2028 or U+0085, which splitlines() takes for the end of a row
        write_text(folder / "reports.jsonl", "".join(json.dumps(row) + "\n" for row in reports))
        write_json(folder / "results.json", result)


def write_json(path: Path, value) -> None:
    """JSON with null for NaN, which JSON does not know."""
    clean = json.loads(json.dumps(value), parse_constant=lambda nan: None)
    write_text(path, json.dumps(clean, indent=2) + "\n")


def finish(folder: Path, settings: dict, weights: dict) -> None:
    """Print the tables of all policies evaluated in `folder` with these settings; write results.md and results.json.

    weights: the settings `rewards` at hand, which star what is a reward; {}, no star, for another system's reports.
    Two processes may evaluate policies of one run: one at a time is let in, and the last one finds all results.
    """
    with lock(folder / ".lock", wait=True):
        results, others, notes = [], [], list(SHOWN["notes"])
        for path in sorted(folder.glob("*/results.json"), key=lambda path: (path.parent.name != "base", path)):
            try:
                result = read_result(path)
                (results if result["settings"] == settings else others).append(result)
            except ValueError as error:
                notes.append(f"not shown: {error}")
        rows, protocol = table_rows(results), settings["eval"].get("protocol", "raw")
        notes += ["*: also a reward of the training."] * bool(weights)
        notes += [f"BLEU, ROUGE-L and METEOR: pycocoevalcap's, {NOTES[protocol]}."]
        notes += [*dict.fromkeys(note for result in results for note in result["notes"]), *unread_notes(rows)]
        names = ", ".join(result["policy"] for result in others)
        notes += [f"not shown, evaluated with other settings: {names}"] * bool(others)
        about = {"studies": f"{settings['n']} studies, {settings['split']}", "protocol": protocol} | settings["eval"]
        titles = {where: title.format(**about) for where, title in SHOWN["titles"].items()
                  if any(column.entry(row) for column in columns(where) for row in rows.values())
                  and (where != "gold" or "labels" in settings.get("data", {}))}  # fmt: skip
        write_json(folder / "results.json", {"settings": settings, "notes": notes, "rows": rows})
        parts = [part for where, title in titles.items() for part in (title, grid(rows, where, weights, "pipe"))]
        write_text(folder / "results.md", "\n\n".join([*parts, *label_table(rows), *notes]) + "\n")
    for where, title in titles.items():
        print(f"\n{title}\n{grid(rows, where, weights)}")
    print("", *notes, f"\nwritten: {folder}/results.md, results.json, */reports.jsonl", sep="\n")


def table_rows(results: list[dict]) -> dict[str, dict]:
    """{title: {"greedy": ..., "sampled": ...}}: what stands beside any policy, each policy, and its reports given to
    other studies."""
    template, references = results[0]["template"], results[0]["references"]
    rows = {"fixed normal template": {"greedy": template}, "references": {"greedy": references}}
    for of in results:
        rows[of["policy"]] = {"greedy": of["greedy"], "sampled": of["sampled"]}
        rows[f"{of['policy']}, {of['shuffled_as']}"] = {"greedy": of["shuffled"], "sampled": of["shuffled_sampled"]}
    return {title: {part: row for part, row in of.items() if row} for title, of in rows.items() if of["greedy"]}


def unread_notes(rows: dict[str, dict]) -> list[str]:
    """How much the evaluation's reader and GREEN's parser could not read."""
    greedy = {name: row["greedy"] for name, row in rows.items()}
    shares = [summary["unread_share"]["value"] or 0 for summary in greedy.values() if "unread_share" in summary]
    unread = [f"{name} {row['green']['unread']} of {row['n']}" for name, row in greedy.items() if "green" in row]
    most, names = 100 * max(shares, default=0), ", ".join(unread)
    return [f"Sentences that the reader could not read: at most {most:.1f}% in any row."] * bool(shares) + [
        f"Answers of GREEN's judge that could not be read, left out of its mean: {names}."] * bool(unread)  # fmt: skip


def draw(heads: list[str], body: list[list[str]], style: str = "plain") -> str:
    """A table for the terminal, as Markdown ("pipe") or HTML ("html"): names to the left, numbers to the right."""
    sides = ("left", *["right"] * (len(heads) - 1))
    return tabulate.tabulate(body, heads, style, disable_numparse=True, colalign=sides, headersglobalalign="right")


def grid(rows: dict[str, dict], where: str, weights: dict, style: str = "plain") -> str:
    """One table of columns.toml; what no row was measured on is left out, but METEOR is n/a without Java. In HTML, each
    number has its interval behind it.
    Starred is what `weights` make a reward; not in comparisons, whose policies had rewards of their own."""
    shown = [c for c in columns(where) if c.key == "greedy/meteor" or any(c.entry(row) for row in rows.values())]

    def cell(row: dict, column: Column) -> str:  # a number or an interval, "n/a" where there is none
        entry = column.entry(row)
        numbers = [entry.get(key) for key in (("lo", "hi") if where == "spans" else ("value",))]
        text = "n/a" if None in numbers else "-".join(f"{column.factor * number:.1f}" for number in numbers)
        stated = where in ("main", "gold") and column.key == "greedy/hallucination_rate" and entry
        if style == "html" and entry.get("lo") is not None:
            text += f" [{column.factor * entry['lo']:.1f}, {column.factor * entry['hi']:.1f}]"
        return f"{text} ({row['greedy']['counts']['stated']})" if stated else text

    body = [[name, *(cell(row, column) for column in shown)] for name, row in rows.items()]
    heads = [c.flat if style != "plain" else c.title if "\n" in c.title else f"\n{c.title}" for c in shown]
    return draw(["", *(head + c.star(weights) for head, c in zip(heads, shown, strict=True))], body, style)


def label_table(rows: dict[str, dict]) -> list[str]:
    """Title and Markdown table of every label's precision, recall and F1 by row; [] where no labels were measured."""
    found = {name: row["greedy"]["per_label"] for name, row in rows.items() if "per_label" in row["greedy"]}
    if not found:
        return []

    def cell(scores: dict) -> str:
        return " / ".join(f"{100 * scores[measure]:.1f}" for measure in MEASURES)

    body = [[label, scores["support"], *(cell(of[label]) for of in found.values())]
            for label, scores in next(iter(found.values())).items()]  # fmt: skip
    heads = ["label", "studies that state it", *found]
    return ["CheXbert labels: precision / recall / F1 in %", draw(heads, body, "pipe")]
