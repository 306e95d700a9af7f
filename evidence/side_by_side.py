"""Reports side by side with their phrases marked by truth, on studies chosen by rule: the paper's Figure 4.

    python -m evidence.side_by_side --run runs/phantom                                # <run>/eval/test/side_by_side.png
    python -m evidence.side_by_side --run runs/seeds/0 --policy base,sft,stage1,valor

The rule: of the test studies that show a finding, sorted by how far the last policy's sided F1 lies above that of
--against (by default VALOR's above Stage 1 continued's; ties in the order of the data), those at QUANTILES:
from much worse to much better. The difference stands above the image. Greedy reports of policies that were evaluated.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from config import Config
from data import load_studies
from evidence.expert_accuracy import f1
from evidence.inputs import begin
from evidence.phrases import MARKS, Phrase, mark_report
from evidence.reader import truth_counts
from formats.files import read_jsonl
from formats.images import read_image
from phantom.assets import resolve
from running import parallel

QUANTILES = (0.02, 0.25, 0.5, 0.75, 0.98)
WIDTH, SIZE = 31, 7  # characters a line; points
CHARACTER, LINE = 0.65 * SIZE / 72, 1.25 * SIZE / 72  # inches: of DejaVu Sans Mono, rounded up to whole pixels
TITLES = {"sft": "SFT", "stage1": "Stage 1", "stage2": "VALOR", "valor": "VALOR"}


@dataclass
class SideConfig(Config):
    policy: str = "base,sft,stage1,stage2"  # evaluated policies of the run, from left to right [ours]
    against: str = "stage1_continued"  # the policy whose sided F1 the last one's is held against [ours]
    split: str = ""  # split that was evaluated; empty = data.test_split [ours]


def choose(ours: dict[str, dict], theirs: dict[str, dict]) -> dict[str, float]:
    """{study: difference in sided F1} at QUANTILES of the difference; ours, theirs: rows of reports.jsonl by study."""
    scores = [{name: f1(truth_counts(row["report"], row["labels"])) for name, row in rows.items() if row.get("labels")}
              for rows in (ours, theirs)]  # fmt: skip
    gains = sorted((value - scores[1][name], i, name) for i, (name, value) in enumerate(scores[0].items()))
    if not gains:
        raise ValueError("no study shows a finding: the marks need the exact labels of the images")
    places = dict.fromkeys(round(q * (len(gains) - 1)) for q in QUANTILES)
    return {gains[place][2]: gains[place][0] for place in places}


def lay_out(text: str, phrases: list[Phrase], width: int) -> tuple[list[tuple[int, int, str, str]], int]:
    """([(line, column, word, mark)], number of lines) of a report in lines of `width` characters; a phrase's first word
    has its mark's symbol before it, and the impression begins a line."""
    placed, line, column = [], 0, 0
    for phrase in phrases:
        words = text[phrase.start : phrase.end].split()
        words[:1] = [MARKS[phrase.mark][0] + word for word in words[:1]]
        for word in words:
            column -= bool(column) and word in ".,"  # close to what they end
            if column and word not in ".," and (column + len(word) > width or word == "IMPRESSION:"):
                line, column = line + 1, 0
            placed.append((line, column, word, phrase.mark))
            column += len(word) + 1
    return placed, line + 1


def write_report(axis, title: str, text: str, labels: list[str]) -> None:
    """A report, and what it leaves out, into an axis that counts in characters and lines."""
    phrases, omitted = mark_report(text, labels)
    placed, lines = lay_out(text, phrases, WIDTH)
    style = {"family": "monospace", "fontsize": SIZE}
    for line, column, word, mark in placed:
        axis.text(column, line + 1.8, word, color=MARKS[mark][1], **style)
    left_out = textwrap.fill(", ".join(omitted).replace("_", " "), WIDTH, initial_indent="○ left out: ")
    axis.text(0, lines + 1.3, left_out if omitted else "", style="italic", va="top", linespacing=1.05, **style)
    axis.text(0, 0.6, title, fontsize=SIZE + 2, weight="bold", va="bottom")


def draw_side_by_side(rows: list[dict], path: Path) -> None:
    """rows: {"title", "image" (PIL), "labels", "reports": {title: report}}, one below the other."""
    side, pitch = 1.5, (WIDTH + 2) * CHARACTER  # inches of an image, and from column to column
    lines = [max(lay_out(text, mark_report(text, [])[0], WIDTH)[1] for text in row["reports"].values()) for row in rows]
    heights = [max((n + 5) * LINE, side + 5 * LINE) for n in lines]  # a title, what is left out, a gap
    width, height = side + 0.3 + len(rows[0]["reports"]) * pitch, sum(heights) + 0.4
    figure, top = Figure(figsize=(width, height)), height - 0.1

    def place(left: float, across: float, down: float) -> tuple[float, float, float, float]:  # in inches, below `top`
        return left / width, (top - down) / height, across / width, down / height

    for row, needed in zip(rows, heights, strict=True):
        axis = figure.add_axes(place(0.1, side, side + 3 * LINE), anchor="S")
        axis.imshow(row["image"], interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(row["title"], fontsize=SIZE)
        shown = textwrap.fill(", ".join(row["labels"]).replace("_", " "), 26)
        axis.text(0, -0.04, shown, transform=axis.transAxes, fontsize=SIZE, va="top")
        for j, (title, text) in enumerate(row["reports"].items()):
            axis = figure.add_axes(place(side + 0.3 + j * pitch, WIDTH * CHARACTER, needed))
            axis.set(xlim=(0, WIDTH), ylim=(needed / LINE, 0))
            axis.set_axis_off()
            write_report(axis, title, text, row["labels"])
        top -= needed
    key = [(f"{symbol} {said}", colour) for symbol, colour, said in MARKS.values() if symbol]
    for i, (said, colour) in enumerate([*key, ("○ in the image, not in the report", "black")]):
        figure.text(0.01 + i / (len(key) + 1), 0.1 / height, said, color=colour, fontsize=SIZE + 1)
    figure.savefig(path, dpi=110)


@parallel.script("side_by_side")
def main() -> None:
    cfg = begin(SideConfig(), __doc__)
    names, split = [name.strip() for name in cfg.policy.split(",")], cfg.split or cfg.data.test_split
    place = Path(cfg.run) / "eval" / split
    found = {name: {row["id"]: row for row in read_jsonl(place / name / "reports.jsonl")}
             for name in (*names, cfg.against)}  # fmt: skip
    ours, rows = found[names[-1]], []
    images = {study.id: study.image for study in load_studies(resolve(cfg, ("data",)).data, split)}
    for name, gain in choose(ours, found[cfg.against]).items():
        reports = {TITLES.get(policy, policy): found[policy][name]["report"] for policy in names}
        rows.append({"title": f"{name}, F1 {100 * gain:+.0f}", "image": read_image(images[name]),
                     "labels": ours[name]["labels"], "reports": reports | {"reference": ours[name]["reference"]}})
    draw_side_by_side(rows, place / "side_by_side.png")
    print(f"written: {place}/side_by_side.png")


if __name__ == "__main__":
    main()
