"""The result tables: one results.json per policy in, one table over all of them out, for terminal and Markdown."""

import contextlib
import fcntl
import json
import math
import os
from pathlib import Path

import numpy as np

from running.folder import write_text

TEMPLATE = "fixed normal template"

# (header in two lines, metric, from the sampled reports?, shown in the table of intervals?)
COLUMNS = (
    (("", "BLEU-4"), "bleu_4", False, True),
    (("", "ROUGE-L"), "rouge_l", False, True),
    (("", "METEOR"), "meteor", False, False),
    (("METEOR", "ex.+st."), "meteor_exact_stem", False, False),
    (("BERT", "Score"), "bertscore", False, False),
    (("CheXb.", "F1"), "f1_micro", False, True),
    (("RadGr.", "F1 *"), "radgraph_f1", False, True),
    (("sided", "F1"), "sided_f1", False, True),
    (("halluc.", "% (n)"), "hallucination_rate", False, True),
    (("omit-", "ted %"), "omission_rate", False, True),
    (("wrong", "side %"), "wrong_side_rate", False, True),
    (("format", "%"), "format_rate", False, False),
    (("", "words"), "length", False, False),
    (("sampled", "F1"), "sided_f1", True, True),
    (("sampled", "hall. %"), "hallucination_rate", True, True),
)
CLINICAL = (
    (("precision", "14 labels"), "precision_micro", False, False),
    (("recall", "14 labels"), "recall_micro", False, False),
    (("micro F1", "14 labels"), "f1_micro", False, False),
    (("macro F1", "14 labels"), "f1_macro", False, False),
    (("micro F1", "5 labels"), "f1_micro_5", False, False),
    (("macro F1", "5 labels"), "f1_macro_5", False, False),
    (("", "GREEN"), "green", False, False),
    (("RaTE", "Score"), "ratescore", False, False),
)
NOTES = (
    "All but words in percent. * RadGraph F1 is also a reward. CheXb. F1: micro, 14 labels. halluc.: stated positives "
    "that are not in the image",
    "(a wrong side counts), of n stated; omitted: of the findings in the image. BLEU, ROUGE-L, METEOR as pycocoevalcap "
    "computes them.",
)


def save(folder: Path, result: dict, reports: list[dict], stats: dict[str, dict]) -> None:
    """Write one policy's results.json, reports.jsonl and stats.npz, each whole or not at all.

    stats.npz holds metrics.collect's arrays, (n studies, k) under "<row>/<family>": what compare.py resamples. An old
    results.json goes first and the new one comes last: where it is, the files belong together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat = {f"{row}/{family}": array for row, families in stats.items() for family, array in families.items()}
    with locked(folder.parent):
        (folder / "results.json").unlink(missing_ok=True)
        with open(folder / "stats.npz.tmp", "wb") as file:
            np.savez_compressed(file, **flat)
        os.replace(folder / "stats.npz.tmp", folder / "stats.npz")
        # ASCII, as a report may hold U+2028 or U+0085, which splitlines() takes for the end of a row
        write_text(folder / "reports.jsonl", "".join(json.dumps(row) + "\n" for row in reports))
        write_json(folder / "results.json", result)


def write_json(path: Path, value) -> None:
    """JSON with null for NaN, which JSON does not know."""

    def clean(x):
        if isinstance(x, dict):
            return {key: clean(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(item) for item in x]
        return None if isinstance(x, float) and math.isnan(x) else x

    write_text(path, json.dumps(clean(value), indent=2) + "\n")


def finish(folder: Path, settings: dict) -> None:
    """Print the tables of all policies evaluated in `folder` with these settings; write results.md and results.json."""
    with locked(folder):
        blocks, rows, notes = write_tables(folder, settings)
    for title, columns, intervals in blocks:
        print(f"\n{title}\n{grid(rows, intervals, markdown=False, columns=columns)}")
    print("", *notes, f"\nwritten: {folder}/results.md, results.json, */reports.jsonl", sep="\n")


@contextlib.contextmanager
def locked(folder: Path):
    """Let one process at a time in: two may evaluate policies of one run, and the last must find all results."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_tables(folder: Path, settings: dict) -> tuple[list[tuple], dict, list[str]]:
    """Write results.md and results.json of `folder`; returns [(title, columns, intervals?)], the rows, the notes."""
    files = sorted(folder.glob("*/results.json"), key=lambda path: (path.parent.name != "base", path.parent.name))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    others = [result["policy"] for result in results if result["settings"] != json.loads(json.dumps(settings))]
    results = [result for result in results if result["policy"] not in others]
    rows = table_rows(results)
    notes = [*NOTES, *dict.fromkeys(note for result in results for note in result["notes"]), *unread_notes(rows)]
    if others:
        notes.append(f"not shown, evaluated with other settings: {', '.join(others)}")
    studies = f"{settings['n']} studies, {settings['split']}"
    spans = f"95% intervals, {settings['eval']['bootstrap']} bootstrap resamples of the studies"
    blocks = [(studies, COLUMNS, False), (spans, COLUMNS, True)]
    if any(column[1] in row["greedy"] for column in CLINICAL for row in rows.values()):
        blocks.append((f"CheXbert labels and model-based scores, {studies}", CLINICAL, False))
    write_json(folder / "results.json", {"settings": settings, "notes": notes, "rows": rows})
    parts = [part for title, c, spans in blocks for part in (title, grid(rows, spans, markdown=True, columns=c))]
    write_text(folder / "results.md", "\n\n".join([*parts, *label_table(rows), *notes]) + "\n")
    return blocks, rows, notes


def unread_notes(rows: dict[str, dict]) -> list[str]:
    """How much the evaluation's reader and GREEN's parser could not read."""
    notes, greedy = [], {name: row["greedy"] for name, row in rows.items()}
    shares = [summary["unread_share"]["value"] for summary in greedy.values() if "unread_share" in summary]
    if shares:
        share = 100 * max(value or 0 for value in shares)
        notes.append(f"Sentences that the evaluation's reader could not read: at most {share:.1f}% in any row.")
    unread = [f"{name} {row['green']['unread']} of {row['n']}" for name, row in greedy.items() if "green" in row]
    if unread:
        notes.append(f"Answers of GREEN's judge that could not be read, left out of its mean: {', '.join(unread)}.")
    return notes


def label_table(rows: dict[str, dict]) -> list[str]:
    """Title and Markdown table of every label's precision, recall and F1 by row; [] where no labels were measured."""
    found = {name: row["greedy"]["per_label"] for name, row in rows.items() if "per_label" in row["greedy"]}
    if not found:
        return []

    def entry(scores: dict) -> str:
        values = [scores.get(key) for key in ("precision", "recall", "f1")]  # older results have F1 alone
        return " / ".join("n/a" if value is None else f"{100 * value:.1f}" for value in values)

    lines = [["label", "studies that state it", *found], ["---", *["---:"] * (1 + len(found))]]
    for label, first in next(iter(found.values())).items():
        lines.append([label, str(first["support"]), *(entry(labels[label]) for labels in found.values())])
    return ["CheXbert labels: precision / recall / F1 in %", "\n".join(f"| {' | '.join(line)} |" for line in lines)]


def table_rows(results: list[dict]) -> dict[str, dict]:
    """{row name: {"greedy": summary, "sampled": summary or absent}}: the template, then each policy and its shuffle."""
    rows = {TEMPLATE: {"greedy": results[0]["template"]}}
    for result in results:
        rows[result["policy"]] = {part: result[part] for part in ("greedy", "sampled") if part in result}
        if "shuffled" in result:
            rows[f"{result['policy']}, {result['shuffled_as']}"] = {"greedy": result["shuffled"]}
    return rows


def grid(rows: dict[str, dict], intervals: bool, markdown: bool, columns: tuple = COLUMNS) -> str:
    """The rows as aligned columns (two header lines) or a Markdown table; what no row was measured on is left out."""

    def measured(metric: str, part: str) -> bool:
        return any(metric in row.get(part, {}) for row in rows.values())

    columns = [c for c in columns if measured(c[1], "sampled" if c[2] else "greedy") and (c[3] or not intervals)]
    body = [[name, *(cell(row, c[1], c[2], intervals) for c in columns)] for name, row in rows.items()]
    headers = [("", ""), *(column[0] for column in columns)]
    if markdown:
        titles = [" ".join(filter(None, header)).replace("- ", "") for header in headers]
        return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---", *["---:"] * len(columns)], *body])
    lines = [[header[i] for header in headers] for i in (0, 1)]
    lines = [line for line in lines if any(line)] + body
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in padded)


def cell(row: dict, metric: str, sampled: bool, interval: bool) -> str:
    """A number as it stands in the table, "n/a" where there is none."""
    summary = row.get("sampled" if sampled else "greedy", {})
    entry = summary.get(metric, {})
    numbers = [entry.get(key) for key in (("lo", "hi") if interval else ("value",))]
    if None in numbers or any(math.isnan(number) for number in numbers):
        text = "n/a"
    else:
        text = "-".join(f"{number if metric == 'length' else 100 * number:.1f}" for number in numbers)
    if metric == "hallucination_rate" and metric in summary and not sampled and not interval:
        text += f" ({summary['counts']['stated']})"
    return text
