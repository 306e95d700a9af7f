"""What a run needs, looked at before it starts: `python train.py --check --config C`, in seconds, exit code 0 or 1.

    ok        is there
    missing   the run would stop without it; the command that fetches it stands below
    to do     the run starts without it, but read the line

Headers and tokenizers are read, weights never (weights.py); the memory is an estimate (memory.py). Nothing is fetched.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from textwrap import indent

import torch
from appdirs import user_cache_dir
from huggingface_hub import snapshot_download
from packaging.requirements import Requirement
from PIL import Image
from tabulate import tabulate

from config import Config
from data import read_split, remarks
from formats.files import read_text
from formats.preferences import read_pairs
from model import encode_prompts
from phantom.cache import resolve
from running import weights
from running.folder import adapter_folder
from running.memory import GIB, KNOWN, SOURCES, Shape, checkpoint_bytes, estimate, read_shape
from scorers.bertscore import baseline_f1
from scorers.load import may_judge
from scorers.ratescore import load_ratescore
from tiny.models import INSTALL, find_minilm
from vlm.adapters import load_adapter
from vlm.families import load_family

Item = tuple[str, str, str, str]  # status, what, text, command or ""
MAX_IMAGE_TOKENS = 1280  # of one image; more is a setting that nobody chose [Qwen2.5-VL's recipes use at most that]
SCORERS = 2 * GIB  # the published CheXbert, RadGraph-XL, distilroberta and BiomedCLIP together, about


def locate(path: str) -> Path:
    """The file or folder of a config's path; of a hub name (`ORG/NAME`, `hf-hub:ORG/NAME/FILE`) its cached copy."""
    place, parts = Path(path), path.removeprefix("hf-hub:").split("/")
    if place.exists():
        return place
    with suppress(OSError, ValueError):  # no hub name, or not in the cache
        return Path(snapshot_download("/".join(parts[:2]), local_files_only=True), *parts[2:])
    return place


def fetch(path: str) -> str:
    """The command that fills a config's path, "" where none can be told; an unknown path may be a hub name."""
    place, parts = Path(path), path.removeprefix("hf-hub:").split("/")
    if place.name in SOURCES["hub"] and not path.startswith("hf-hub:"):
        folder = place.parent if place.suffix == ".pth" else place
        return " && ".join(f"hf download {what} --local-dir {folder}" for what in SOURCES["hub"][place.name])
    if len(parts) in (2, 3) and parts[0][:1].isalnum():
        return f"hf download {' '.join(['/'.join(parts[:2]), *parts[2:]])}   # if that is a hub name; else correct it"
    return ""


def look(what: str, path: str, test: Callable[[Path], str | None], command: str = "") -> Item:
    """One line about `path`: test(place) raises for what is wrong with it, or may return a remark."""
    if path.startswith(("phantom:", "tiny:")):
        return "ok", what, f"{path}: built on first use", ""
    try:
        place = locate(path)
        return "ok", what, ": ".join(filter(None, (str(place), test(place)))), ""
    except weights.BROKEN as error:
        said = str(error) if isinstance(error, OSError | ValueError) else f"{path}: {type(error).__name__}: {error}"
        return "missing", what, said, command or fetch(path)


def version(package: str) -> str:
    """Of an installed package; "" where it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def check_programs() -> Iterator[Item]:
    """What is installed: packages against requirements.txt's floors, and Java, without which evaluate.py goes on."""
    lines = read_text(Path(__file__).parents[1] / "requirements.txt").splitlines()
    needs = [Requirement(need) for line in lines if (need := line.partition("#")[0].strip())]
    bad = [f"{need.name} is {version(need.name) or 'not installed'}, needed {need.specifier}" for need in needs
           if not need.specifier.contains(version(need.name) or "0", prereleases=True)]  # fmt: skip
    command = "pip install -r requirements.txt -c constraints.txt" if bad else ""
    yield "missing" if bad else "ok", "packages", "; ".join(bad) or f"all {len(needs)} of requirements.txt", command
    lacking = "to do", "Java", "no `java` on PATH: the tables will lack METEOR", "apt-get install default-jre-headless"
    yield ("ok", "Java", "there, for METEOR", "") if shutil.which("java") else lacking


def check_data(cfg: Config) -> Iterator[Item]:
    """The first 8 studies of each split that a run reads; their images are opened."""
    data, path = cfg.data, Path(cfg.data.path)
    if data.path.startswith("phantom:"):
        yield "ok", "data", f"{data.path}: built on first use", ""
        return
    for split in dict.fromkeys((data.sft_split, data.rl_split, data.val_split, data.test_split)):
        try:
            studies, skips = read_split(replace(data, limit=8), split)
        except (OSError, ValueError) as error:
            gold = data.labels and any(name in str(error) for name in (data.labels, "reports.csv"))
            command = SOURCES["data"]["gold" if gold else data.format] if gold or not path.is_dir() else ""
            yield "missing", "data", str(error), command.format(path=path, up=path.parent, labels=data.labels)
            return
        said = "; ".join([f"the first {len(studies)} studies can be read", *remarks(data, studies, skips)])
        status = "ok" if all(study.view_known for study in studies) else "to do"
        yield status, "data", f"{path} [{split}]: {said}", ""


def check_policy(folder: Path, max_pixels: int = 0) -> str:
    """The base model's family and size; ValueError where loading it would fail, which is tried without its weights."""
    weights.require(folder, "config.json")  # else the hub is asked, for half a minute where there is no network
    model, processor = load_family(str(folder), torch.float32, max_pixels, device_map="meta")
    with weights.loading(f"{folder}: no prompt can be made"):
        encode_prompts(processor, [Image.new("RGB", (64, 64))], "Write the report.", "cpu")
    return f"{model.config.model_type}, {model.num_parameters():,} weights, every shard whole"


def check_adapter(folder: Path, base: str) -> str:
    """ValueError unless each of an adapter's weights has its place on the base, of which the names alone are read."""
    if not Path(base).exists():
        return "not tried, as its base is not there yet"
    load_adapter(load_family(base, torch.float32, device_map="meta")[0], folder)
    return "all its weights have a place on the base"


def check_encoder(folder: Path, with_weights: bool = False) -> None:
    """ValueError unless `folder` has a configuration, a tokenizer that can spell and, if asked, whole weights."""
    weights.require(folder, "config.json")
    weights.load_tokenizer(folder)
    if with_weights:
        weights.check_weights(folder)


def check_scorers(cfg: Config) -> Iterator[Item]:
    """The files of the frozen scorers of Eqs. 3, 4 and 6; of an encoder whose weights are elsewhere all but these."""
    s, e, check_whole = cfg.scorers, cfg.eval, partial(check_encoder, with_weights=True)
    flags = may_judge(cfg, cfg.stage != "1" and cfg.rewards.lambda_vis > 0) if cfg.stage not in ("0", "dpo") else []
    if flags:
        yield "missing", "scorers", f"only the phantom's, which know no real reports: set {', '.join(flags)}", ""
    if s.bert.startswith("tiny:"):
        yield look("MiniLM", "", lambda place: f"{find_minilm()}, for labeller and BERTScore", INSTALL)
    yield look("CheXbert", s.chexbert, weights.check_torch_file)
    yield look("CheXbert", s.bert, check_encoder)
    yield look("BERTScore", s.bertscore, check_whole)
    if s.bertscore_baseline:
        given = s.bertscore, s.bertscore_layer, s.bertscore_baseline
        yield look("BERTScore", "", lambda place: f"{given[2]}: baseline {baseline_f1(*given):.3f} at layer {given[1]}")
    if s.expert != "oracle":
        yield look("expert", s.expert, weights.check_open_clip)
    if e.green:
        yield look("GREEN", e.green, check_whole)
    if e.ratescore:
        yield look("RaTEScore", e.ratescore, lambda place: load_ratescore(str(place)) and "", SOURCES["ratescore"])
    if s.radgraph in ("auto", "rules"):
        yield "ok", "RadGraph", "the rules need no file", ""
        return
    up = Path(s.radgraph_dir or user_cache_dir("radgraph", version=version("radgraph")))
    folder = up / s.radgraph
    archive = look("RadGraph", str(folder), weights.check_radgraph, SOURCES["radgraph"].format(up=up, name=s.radgraph))
    yield archive
    if archive[0] == "ok":
        yield look("RadGraph", weights.check_radgraph(folder), check_encoder)


def policy_shape(cfg: Config) -> Shape | None:
    """The policy's shape from its files, else from its published sizes; None where neither is known."""
    folder, pixels = locate(cfg.model.path), cfg.model.max_pixels
    if folder.is_dir():
        with suppress(ValueError):  # check_policy says what is wrong with it
            model, processor = load_family(str(folder), torch.float32, pixels, device_map="meta")
            largest = processor.image_processor.size.get("longest_edge", 0)  # Qwen's name for a number of pixels
            return read_shape(model.config, model.num_parameters(), largest)
    shape = KNOWN.get(Path(cfg.model.path).name)
    return replace(shape, image_tokens=pixels // 784) if shape and pixels else shape  # 28 x 28 pixels a token


def check_room(cfg: Config) -> Iterator[Item]:
    """Disk for the stages' checkpoints, plus 1 GiB for logs and samples; GPU memory by memory.py's estimate."""
    shape, place = policy_shape(cfg), Path(cfg.run).absolute()
    free = shutil.disk_usage(next(filter(Path.exists, (place, *place.parents)))).free / GIB
    need = 1 + (checkpoint_bytes(shape, cfg) / GIB if shape else 0)
    text = f"{cfg.run} needs about {need:.1f} GiB, {free:.1f} GiB are free"
    yield "ok" if free > need else "missing", "disk", text, ""
    if shape is None:
        small = cfg.model.path.startswith(("phantom:", "tiny:"))
        text = "these small models fit anywhere" if small else "no estimate without the policy's files"
        yield "ok" if small else "to do", "memory", text, ""
        return
    checkpointed = replace(cfg, model=replace(cfg.model, gradient_checkpointing=True))
    rows = []
    for stage in (0, "dpo") if cfg.stage == "dpo" else range(3):
        least = estimate(shape, checkpointed, stage, SCORERS)["total"]
        parts = estimate(shape, cfg, stage, SCORERS) | {"checkpointed": least}
        rows.append({"": f"Stage {stage}"} | {name: value / GIB for name, value in parts.items()})
    setting = f"{cfg.grpo.batch_size} studies x {cfg.rollout.group_size} candidates, micro_batch {cfg.grpo.micro_batch}"
    text = f"GiB on one GPU, an estimate: {setting}; sampling and loss take turns; the last column is the total with "
    table = indent(tabulate(rows, headers="keys", tablefmt="plain", floatfmt=".1f"), " " * 20)
    yield "ok", "memory", f"{text}model.gradient_checkpointing\n{table}", ""
    if shape.image_tokens > MAX_IMAGE_TOKENS:
        yield "to do", "memory", f"{shape.image_tokens} tokens an image; model.max_pixels = 401408 gives 512", ""
    have = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 0
    need = max(row["total"] for row in rows)
    text = f"the GPU has {have:.0f} GiB" if have else "no GPU here"
    text += f", the largest stage needs about {need:.0f} GiB"
    if 0 < have < need:
        text += ": set model.gradient_checkpointing, or lower grpo.micro_group or the stages' micro_batch"
    yield "ok" if need <= have else "to do", "memory", text, ""


def preflight(cfg: Config) -> int:
    """Print the list; returns the exit code, 1 when something is missing."""
    policy = partial(check_policy, max_pixels=cfg.model.max_pixels)
    on_base = partial(check_adapter, base=str(locate(resolve(cfg).model.path)))
    items = [*check_programs(), *check_data(cfg), look("policy", cfg.model.path, policy)]
    items += [look("adapter", str(adapter_folder(path)), on_base) for path in (cfg.init_from, cfg.reference) if path]
    if cfg.stage == "dpo":
        make = f"python -m evidence.pairs --run {cfg.run} --out {cfg.dpo.pairs or 'FILE'}   # after --stage 0"
        items.append(look("pairs", cfg.dpo.pairs, lambda place: f"{len(read_pairs(place))} can be read", make))
    items += [*check_scorers(cfg), *check_room(cfg)]
    for status, what, text, command in items:
        print(f"{status:<8}  {what:<10}{text}" + (f"\n{'':20}$ {command}" if command else ""))
    counts = {status: sum(item[0] == status for item in items) for status in ("ok", "missing", "to do")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["missing"] > 0)
