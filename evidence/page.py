"""A run as one HTML file to look at: an update step by step, the curves, and what every policy writes.

    python -m evidence.page --run runs/phantom               # writes runs/phantom/page.html; the demo ends with it
    python -m evidence.page --run runs/mimic --images true   # with images that may not be shared, for your own eyes

It reads what the run left (metrics.jsonl, samples.jsonl, eval/, attention/*.png) and scores nothing anew. What a run
does not have, such as exact truth or an evaluation, is left out. Laid out by page.html.jinja, page.css and page.js.
"""

import base64
import io
import os
from collections import namedtuple
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from config import Config, flatten, from_recorded, parse, to_dict
from data import read_split
from evidence.phrases import MARKS, mark_report
from evidence.reader import read_report, truth_counts
from evidence.tables import grid
from formats.files import read_json, read_jsonl
from formats.images import read_image
from grpo import group_advantages
from phantom.cache import resolve
from phantom.image import decode_mask, outline
from rewards import mix_visual, rank_reward, strip_tags, text_reward
from running import parallel
from running.folder import write_text

TITLES = {"base": "Base", "sft": "SFT", "stage1": "Stage 1", "stage1_continued": "Stage 1 continued",
          "stage2": "VALOR (Stage 2)"}  # fmt: skip
GROUPS, STUDIES, LARGEST = 8, 48, 8_000_000  # of a stage; of the split; bytes, above which both are halved
CURVES = r"^(reward/(?!visual|format)|val/|(kl|length|format_rate|entropy|spread/total)$)"  # r_vis's mean is 1/2
SMOOTH, FAR = 9, 6  # updates in a running mean or median; median distances from it that make an update unusual
TOKENS = {"pieces", "ratio", "clipped", "kl", "moved"}  # of a recorded candidate: running/log.py
Stage = namedtuple("Stage", "name title cfg log samples done")  # `log`: metrics.jsonl by update; `done`: finished
SHADES = ("advantage x ratio, the push of Eq. 10", "change of log-prob, what the update did", "KL to the SFT policy")
pd.set_option("display.max_colwidth", None)  # else a long setting ends in "..."


@dataclass
class PageRun(Config):
    images: bool = False  # show images of a data set that may not be shared, too (MIMIC-CXR) [ours]


def read_stages(run: Path) -> list[Stage]:
    """The stages of a run, finished or not, in the order of their updates."""
    found = []
    for path in run.glob("*/config.json"):
        name, done = path.parent.name, (path.parent / "adapter").exists()
        files = [path.with_name(file) for file in ("metrics.jsonl", "samples.jsonl")]
        metrics, samples = (read_jsonl(file, whole=False) if file.exists() else [] for file in files)
        log = pd.DataFrame(metrics or {"k": []}).drop_duplicates("k", keep="last").set_index("k")
        found.append(Stage(name, TITLES.get(name, name), from_recorded(path, Config())[0], log, samples, done))
    if not found:
        raise ValueError(f"{run}: no run folder: there is no <stage>/config.json in it")
    return sorted(found, key=lambda s: (s.name != "sft", s.log.index.min() if len(s.log) else np.inf, s.name))


def data_uri(image, side: int = 448) -> str:
    """A PIL image as text: a PNG when it is small, else a JPEG; it is scaled down to at most `side` pixels a side."""
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.thumbnail((side, side))
    image.save(buffer := io.BytesIO(), kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_pictures(cfg: Config, split: str, ids: set[str]) -> dict[str, dict]:
    """{id: image, its size, labels, findings with their outlines} of the studies `ids` of a split; None: not known."""
    data, found = resolve(cfg).data, {}
    path = Path(data.path) / "truth.jsonl"
    truth = {row["id"]: row.get("findings") for row in read_jsonl(path)} if path.exists() else {}
    for study in (study for study in read_split(data, split)[0] if study.id in ids):
        image, findings = read_image(study.image), truth.get(study.id)
        for finding in findings or ():
            mask = decode_mask(finding["mask"])
            y = np.argwhere(mask)[mask.sum() // 8][0]  # its number stands near its upper end, where few others do
            finding["at"], finding["lines"] = (np.median(np.flatnonzero(mask[y])) + 0.5, y + 0.5), outline(mask)
            finding["what"] = " ".join(filter(None, map(finding.get, ("severity", "side", "site", "name"))))
        labels = None if data.labels else study.labels  # gold labels are not what the marks are made for
        found[study.id] = {"size": image.size, "uri": data_uri(image), "findings": findings, "labels": labels}
    return found


def marked(text: str, labels: list[str] | None) -> dict:
    """A report in phrases, marked where the truth is known, with what it states and omits and reader.truth_counts."""
    text = strip_tags(text)
    if labels is None:
        return {"text": text, "phrases": [(0, len(text), "plain", ())], "omitted": [], "counts": {}, "stated": text}
    phrases, omitted = mark_report(text, labels)
    counts, stated = truth_counts(text, labels), read_report(text).stated
    return {"text": text, "phrases": phrases, "omitted": omitted, "counts": counts, "stated": stated}


def explain(stage: Stage, row: dict, labels: list[str] | None) -> dict:
    """A row of samples.jsonl with all that fills its equations, candidates from the best to the worst: recorded, or by
    the method's own functions. labels: the findings in the study's image, where they are known."""
    r, group = stage.cfg.rewards, [dict(c, n=n) for n, c in enumerate(row["candidates"], 1)]
    parts = [name for name in row["candidates"][0] if name not in {"text", "reward", *TOKENS}]
    share = r.lambda_vis if "visual" in parts else 0.0
    weights = {name: (1 - share) * text_reward({x: float(x == name) for x in parts}, r) for name in parts}
    r_text = torch.tensor([text_reward(c, r) for c in group])  # (G,)
    advantages = group_advantages(torch.tensor([c["reward"] for c in group]), stage.cfg.grpo.advantage)  # (G,)
    s = [-1.0 if c.get("similarity") is None else c["similarity"] for c in group]
    pairs = torch.tensor([[[x, y] for j, y in enumerate(s) if j != i] for i, x in enumerate(s)])  # (G, G - 1, 2)
    values = {"r_text": r_text, "mixed": mix_visual(r_text, 0.0, 0.0, r.mix), "advantage": advantages,
              "wins": rank_reward(pairs, "soft", r.tau)[..., 0]}  # fmt: skip
    group = [c | {name: x[i].tolist() for name, x in values.items()} for i, c in enumerate(group)]
    if TOKENS <= group[0].keys():
        pushed = [np.array([np.multiply(c["advantage"], c["ratio"]), c["moved"], c["kl"]]) for c in group]  # (3, T)s
        largest = np.abs(np.hstack(pushed)).max(axis=1).clip(1e-6)  # (3,)
        for c, x in zip(group, pushed, strict=True):
            ends, shades = np.cumsum(c["pieces"]), (x.T / largest).round(2).tolist()
            words = [c["text"][end - size : end] or "■" for size, end in zip(c["pieces"], ends, strict=True)]
            c["tokens"] = [*zip(words, c["ratio"], c["kl"], np.exp(c["moved"]), shades, strict=True)]
    return {"greedy": [], **row, "stage": stage, "card": f"{stage.name}-{row['k']}", "labels": labels,
            "label": f"{stage.title}, update {row['k']}, study {row['id']}",
            "weights": weights | {"similarity": None, "visual": share, "format": r.lambda_format, "reward": None},
            "spread": pd.DataFrame(group)[[*parts, "reward"]].astype(float).std(ddof=0).fillna(0.0),
            "metrics": stage.log.reindex([row["k"]]).loc[row["k"]].dropna(),
            "candidates": sorted(group, key=lambda c: -c["reward"])}  # fmt: skip


def written(run: Path, cfg: Config, most: int) -> dict:
    """What the evaluation on the test split left: the policies, `most` studies with all reports, the results."""
    folder, studies = run / "eval" / cfg.data.test_split, []
    reports = {p.parent.name: {row["id"]: row for row in read_jsonl(p)} for p in folder.glob("*/reports.jsonl")}
    names = sorted(reports, key=[*TITLES, *sorted(reports)].index)
    ids = [key for key in next(iter(reports.values()), ()) if all(key in table for table in reports.values())]
    for n, key in enumerate(ids[:most], 1):
        row = reports[names[-1]][key]
        labels = None if cfg.data.labels else row.get("labels")
        found = {name: marked(reports[name][key]["report"], labels) for name in names}
        studies.append({"card": f"study-{n}", "label": f"Study {key}", "id": key, "labels": labels, "reports": found,
                        "reference": marked(row["reference"], labels)})  # fmt: skip
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    return {"policies": names, "studies": studies, "tested": len(ids), "results": results}


def pick(items: list, most: int) -> list:
    """At most `most` of the items, evenly spread, always with the first and the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


def unusual(stages: list[Stage], groups: list[dict]) -> list[tuple]:
    """(stage, update, number, its value, how far from the median around it, the recorded group nearest to it)."""
    found = []
    for stage in stages:
        log = stage.log.reindex(columns=["kl", "reward/total", "reward/chexbert"])
        for _, some in log.groupby(log.pop("reward/chexbert").notna()):
            off = some - some.rolling(SMOOTH, center=True, min_periods=1).median()
            far = off[off.abs() > FAR * off.abs().median().replace(0, np.inf)].stack().dropna()
            for (k, key), x in far.items():
                near = min((g for g in groups if g["stage"] is stage), key=lambda g: abs(g["k"] - k), default=None)
                found.append((stage, k, key, some[key][k], x, near))
    return sorted(found, key=lambda entry: entry[1])


def render(run: Path, images: bool, most_groups: int, most_studies: int) -> str:
    """The page of a run with at most so many groups of a stage and so many studies."""
    stages, notes, pictures = read_stages(run), [], {}
    cfg, rl = stages[-1].cfg, [stage for stage in stages if "kl" in stage.log]
    recorded = [(stage, row) for stage in stages for row in pick(stage.samples, most_groups)]
    restricted = any("mimic" in f"{s.cfg.data.format} {s.cfg.data.path}".lower() for s in stages)
    shown, output = images or not restricted, written(run, cfg, most_studies)
    for split, ids in ((cfg.data.rl_split, {row["id"] for _, row in recorded}),
                       (cfg.data.test_split, {study["id"] for study in output["studies"]})):  # fmt: skip
        try:
            pictures |= read_pictures(cfg, split, ids) if shown and ids else {}
        except (ValueError, OSError) as error:
            notes.append(f"No images of the split {split}: {error}")
    groups = [explain(stage, row, pictures.get(row["id"], {}).get("labels")) for stage, row in recorded]
    configs = {"default": Config()} | {stage.title: stage.cfg for stage in stages}
    settings = pd.DataFrame({title: flatten(to_dict(own)) for title, own in configs.items()}).astype(str)
    settings = settings.drop(["stage", "run", "name"]).rename_axis(columns="setting")
    log = pd.concat([stage.log for stage in rl] or [pd.DataFrame()]).filter(regex=CURVES)  # (K, numbers)
    overlays = sorted((run / "attention").glob("*.png")) if shown else []
    looks = [(path.stem, data_uri(read_image(path), 900)) for path in pick(overlays, most_studies // 4)]
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True,
                        finalize=lambda x: f"{x:g}" if isinstance(x, float) else x)  # fmt: skip
    pages.filters["spoken"] = lambda label: " ".join(reversed(label.split("_")))
    return pages.get_template("page.html.jinja").render(
        output, run=run, root=os.path.relpath(Path(__file__).parents[1], run.resolve()), cfg=cfg, stages=stages, rl=rl,
        log=log[sorted(log, key=lambda key: (key[:6] != "reward", "total" not in key, key))], groups=groups, far=FAR,
        samples=sum(len(stage.samples) for stage in stages), starts={stage.log.index[0]: stage.title for stage in rl},
        notes=notes, restricted=restricted, shown=shown, pictures=pictures, unusual=unusual(rl, groups), smooth=SMOOTH,
        settings=settings, titles=TITLES, marks=MARKS, shades=SHADES, marked=marked, pick=pick, grid=grid, looks=looks,
        attention=len(overlays), SequenceMatcher=SequenceMatcher)  # fmt: skip


def write_page(run: Path, images: bool = False) -> Path:
    """Write `<run>/page.html`, with fewer groups and studies where it would be larger than LARGEST; its path."""
    groups, studies = GROUPS, STUDIES
    while len((html := render(run, images, groups, studies)).encode()) > LARGEST and groups > 1:
        groups, studies = groups // 2, studies // 2
    write_text(run / "page.html", html)
    return run / "page.html"


@parallel.script("page")
def main() -> None:
    cfg = parse(PageRun, __doc__)
    print(f"written: {write_page(Path(cfg.run), cfg.images)}")


if __name__ == "__main__":
    main()
