"""A run as one HTML file to look at: an update step by step, the curves, and what every policy writes.

    python -m evidence.page --run runs/phantom               # writes runs/phantom/page.html; the demo ends with it
    python -m evidence.page --run runs/mimic --images true   # with images that may not be shared, for your own eyes

It reads what the run left (metrics.jsonl, samples.jsonl, eval/, attention/*.png) and scores nothing anew. What a run
does not have, such as exact truth or an evaluation, is left out. page.css and page.js are copied into the page.
"""

import base64
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from config import Config, flatten, from_recorded, parse, to_dict
from data import read_split
from evidence.curves import RULE, SMOOTH, charts, pick, unusual
from evidence.group import Stage, explain, marked
from evidence.tables import columns
from formats.files import read_json, read_jsonl
from formats.images import read_image
from phantom.cache import resolve
from phantom.image import decode_mask, outline
from running.folder import write_text

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent
TITLES = {"base": "Base", "sft": "SFT", "stage1": "Stage 1", "stage1_continued": "Stage 1 continued",
          "stage2": "VALOR (Stage 2)"}  # fmt: skip
GROUPS, STUDIES, LARGEST = 8, 48, 8_000_000  # of a stage; of the split; bytes, above which both are halved
SHADES = ("advantage x ratio, the push of Eq. 10", "change of log-prob, what the update did", "KL to the SFT policy")


@dataclass
class PageRun(Config):
    images: bool = False  # show images of a data set that may not be shared, too (MIMIC-CXR) [ours]


def rows(path: Path) -> list[dict]:
    """The rows of a .jsonl of the run, of whose last line a kill may have left a half; [] for no file."""
    lines = path.read_text("utf-8", "replace").split("\n")[:-1] if path.exists() else []
    try:
        return json.loads("[" + ",\n".join(lines) + "]")
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): take that line out") from error


def read_stages(run: Path) -> list[Stage]:
    """The stages of a run, finished or not, in the order of their updates."""
    found = []
    for path in run.glob("*/config.json"):
        name, tables = path.parent.name, [rows(path.with_name(f"{name}.jsonl")) for name in ("metrics", "samples")]
        done = (path.parent / "adapter").exists()
        found.append(Stage(name, TITLES.get(name, name), from_recorded(path, Config())[0], *tables, done))
    if not found:
        raise ValueError(f"{run}: no run folder: there is no <stage>/config.json in it")
    return sorted(found, key=lambda s: (s.name != "sft", s.metrics[0]["k"] if s.metrics else math.inf, s.name))


def data_uri(image: Image.Image, side: int = 448) -> str:
    """An image as text: a PNG when it is small, else a JPEG of at most `side` pixels a side."""
    image, small = image.convert("RGB"), max(image.size) <= 128
    image.thumbnail((side, side))
    image.save(buffer := io.BytesIO(), "PNG" if small else "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_pictures(cfg: Config, split: str, ids: set[str]) -> dict[str, dict]:
    """{id: image, its size, labels, findings with their outlines} of the studies `ids` of a split."""
    data, truth = resolve(cfg).data, {}
    if (path := Path(data.path) / "truth.jsonl").exists():
        truth = {row["id"]: row["findings"] for row in read_jsonl(path) if row["id"] in ids}
    found = {}
    for study in (study for study in read_split(data, split)[0] if study.id in ids):
        image, findings = read_image(study.image), []
        for finding in truth.get(study.id, ()):
            mask, words = decode_mask(finding["mask"]), [finding[x] for x in ("severity", "side", "site", "name")]
            path = "".join(f"M{'L'.join(f'{x:.1f} {y:.1f}' for x, y in line)}" for line in outline(mask))
            y = np.argwhere(mask)[mask.sum() // 8][0]  # its number stands near its upper end, where few others do
            at = float(np.median(np.flatnonzero(mask[y]))) + 0.5, float(y) + 0.5
            findings.append({"what": " ".join(filter(None, words)), "path": path, "at": at})
        found[study.id] = {"uri": data_uri(image), "size": image.size, "findings": findings, "labels": study.labels}
    return found


def written(run: Path, cfg: Config, most: int) -> dict:
    """What the evaluation on the test split left: the policies, `most` studies with all reports, the results."""
    folder = run / "eval" / cfg.data.test_split
    files = folder.glob("*/reports.jsonl")
    reports = {path.parent.name: {row["id"]: row for row in read_jsonl(path)} for path in files}
    names = sorted(reports, key=lambda name: (name not in TITLES, [*TITLES, name].index(name)))
    ids = [key for key in reports[names[-1]] if all(key in table for table in reports.values())] if names else []
    studies = []
    for n, key in enumerate(ids[:most], 1):
        row = {name: reports[name][key] for name in names}
        labels = row[names[-1]].get("labels")
        found = {name: marked(row[name]["report"], labels) for name in names}
        studies.append({"id": f"study-{n}", "study": key, "label": f"Study {key}", "reports": found,
                        "reference": marked(row[names[-1]]["reference"], labels), "known": labels is not None,
                        "differs": len({str(found[name]["stated"]) for name in names if name != "base"}) > 1,
                        "invented": [name for name in names if found[name]["invents"]],
                        "omitted": [name for name in names if found[name]["omitted"]]})  # fmt: skip
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    known = {column.key: column for where in ("main", "clinical") for column in columns(where)}.values()
    table = [column for column in known if any(map(column.entry, results.get("rows", {}).values()))]
    return {"policies": names, "studies": studies, "tested": len(ids), "results": results, "table": table}


def code(name: str, folder: Path) -> Markup:
    """A link from a page in `folder` to a function or class of ours; ValueError for one that is not there."""
    *parts, function = name.split(".")
    path = ROOT.joinpath(*parts).with_suffix(".py")
    if not re.search(rf"^(def|class) {function}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
        raise ValueError(f"page: {path} has no {function}")
    shown = path.relative_to(ROOT), function
    return Markup('<a href="{}"><code>{}: {}</code></a>').format(os.path.relpath(path, folder), *shown)


def render(run: Path, images: bool, most_groups: int, most_studies: int) -> str:
    """The page of a run with at most so many groups of a stage and so many studies."""
    stages, notes, pictures = read_stages(run), [], {}
    cfg, rl = stages[-1].cfg, [stage for stage in stages if stage.metrics and "kl" in stage.metrics[0]]
    recorded = [(stage, row) for stage in stages for row in pick(stage.samples, most_groups)]
    restricted = any("mimic" in f"{s.cfg.data.format} {s.cfg.data.path}".lower() for s in stages)
    shown, output = images or not restricted, written(run, cfg, most_studies)
    for split, ids in ((cfg.data.rl_split, {row["id"] for _, row in recorded}),
                       (cfg.data.test_split, {study["study"] for study in output["studies"]})):  # fmt: skip
        try:
            pictures |= read_pictures(cfg, split, ids) if shown and ids else {}
        except (ValueError, OSError) as error:
            notes.append(f"No images of the split {split}: {error}")
    groups = [explain(stage, row, pictures.get(row["id"], {}).get("labels")) for stage, row in recorded]
    values = [flatten(to_dict(stage.cfg)) for stage in stages]
    settings = [(key, default, [own[key] for own in values]) for key, default in flatten(to_dict(Config())).items()
                if key not in ("stage", "run", "name")]  # fmt: skip
    overlays = sorted((run / "attention").glob("*.png")) if shown else []
    pages = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True)  # fmt: skip
    pages.globals["code"] = partial(code, folder=run.resolve())
    pages.filters["subscripts"] = lambda text: Markup(re.sub(r"_(\w+)", r"<sub>\1</sub>", str(escape(text))))
    return pages.get_template("page.html.jinja").render(
        output, run=run, stages=stages, rl=rl, groups=groups, samples=sum(len(stage.samples) for stage in stages),
        notes=notes, restricted=restricted, shown=shown, pictures=pictures, cfg=cfg, charts=charts(rl, groups),
        unusual=unusual(rl, groups), settings=settings, titles=TITLES, smooth=SMOOTH, rule=RULE,
        shades=SHADES, all_overlays=len(overlays),
        overlays=[(path.stem, data_uri(Image.open(path), 900)) for path in pick(overlays, most_studies // 4)],
        **{kind: Markup((HERE / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js")})  # fmt: skip


def write_page(run: Path, images: bool = False) -> Path:
    """Write `<run>/page.html`, with fewer groups and studies where it would be larger than LARGEST; its path."""
    groups, studies = GROUPS, STUDIES
    while len((html := render(run, images, groups, studies)).encode()) > LARGEST and groups > 1:
        groups, studies = groups // 2, studies // 2
    write_text(run / "page.html", html)
    return run / "page.html"


def main() -> None:
    cfg = parse(PageRun, __doc__)
    try:
        print(f"written: {write_page(Path(cfg.run), cfg.images)}")
    except (ValueError, OSError) as error:
        sys.exit(f"page: {error!s:.1500}")


if __name__ == "__main__":
    main()
