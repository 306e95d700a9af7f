"""What a run needs, looked at before it starts: `python train.py --check --config C`, in seconds, exit code 0 or 1.

    ok        is there
    missing   the run would stop without it; the command that fetches it stands below
    to do     the run starts without it, but read the line

Looked at: packages, data (a few studies of each split), the policy's and the scorers' files, Java, GPU memory, disk.
Headers are read, weights never (checkpoints.py); the memory is an estimate (memory.py). Nothing is fetched from here,
and nothing of the data leaves the machine.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from config import Config
from data import describe_skips, read_split
from vlm.families import PARTS
from running.memory import GIB, KNOWN, Shape, checkpoint_bytes, estimate, read_shape
from running.weights import (
    TOKENIZER_FILES,
    check_bert,
    check_open_clip,
    check_radgraph,
    check_torch_file,
    count_weights,
    read_json,
    require,
)

Item = tuple[str, str, str, str]  # status, what, text, command or ""
STUDIES = 8  # of each split that are read
MAX_IMAGE_TOKENS = 1280  # of one image; more is a setting that nobody chose [Qwen2.5-VL's recipes use at most that]
SCORERS = 2 * GIB  # the published CheXbert, RadGraph-XL, distilroberta and BiomedCLIP together, about

BERT_FILES = "config.json tokenizer.json tokenizer_config.json"
HUB = {  # last part of a path in configs/ -> hub repositories and, where not all of one is wanted, its files
    "llava-med-v1.5-mistral-7b": ("microsoft/llava-med-v1.5-mistral-7b",),
    "Qwen2.5-VL-7B-Instruct": ("Qwen/Qwen2.5-VL-7B-Instruct",),
    "BiomedCLIP": (
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract config.json",  # of its text tower
    ),
    "chexbert.pth": ("StanfordAIMI/RRG_scorers chexbert.pth",),
    "bert-base-uncased": (f"google-bert/bert-base-uncased {BERT_FILES} vocab.txt",),
    "distilroberta-base": (f"distilbert/distilroberta-base {BERT_FILES} vocab.json merges.txt model.safetensors",),
}
WGET = "wget -r -N -c -np -nH --cut-dirs=3 -P {path} --user YOUR_PHYSIONET_NAME --ask-password https://physionet.org"
OPENI = "https://openi.nlm.nih.gov/imgs/collections"
DATA = {  # data.format -> where the data set comes from
    "r2gen": "pip install gdown && gdown 1c0BXEuDy8Cmm2jfN0YYGkQxFZd2ZIoLg -O {path}.zip && unzip -q {path}.zip -d {up}"
    "   # IU-Xray as R2Gen shares it; must give {path}/annotation.json and {path}/images/",
    "openi": f"wget -P {{path}} {OPENI}/NLMCXR_reports.tgz {OPENI}/NLMCXR_png.tgz && mkdir -p {{path}}/images && "
    "tar xzf {path}/NLMCXR_reports.tgz -C {path} && tar xzf {path}/NLMCXR_png.tgz -C {path}/images",
    "kaggle": "kaggle datasets download -d raddar/chest-xrays-indiana-university -p {path} --unzip",
    "mimic": f"{WGET}/files/mimic-cxr-jpg/2.1.0/ && {WGET}/files/mimic-cxr/2.1.0/mimic-cxr-reports.zip && unzip -q "
    "{path}/mimic-cxr-reports.zip -d {path}   # 500 GB, for credentialed users: physionet.org/content/mimic-cxr-jpg",
}


def locate(path: str) -> Path:
    """The file or folder of a config's path; of a hub name (`ORG/NAME`, `hf-hub:ORG/NAME/FILE`) its cached copy."""
    from huggingface_hub import try_to_load_from_cache

    parts = path.removeprefix("hf-hub:").split("/")
    if not Path(path).exists() and len(parts) in (1, 2, 3) and all(part[:1].isalnum() for part in parts):
        for file in parts[2:] or ("config.json", "open_clip_config.json"):
            found = try_to_load_from_cache("/".join(parts[:2]), file)
            if isinstance(found, str):
                return Path(found) if parts[2:] else Path(found).parent
    return Path(path)


def fetch(path: str) -> str:
    """The command that fills a config's path, "" where none can be told; what HUB does not know may be a hub name."""
    place, parts = Path(path), path.removeprefix("hf-hub:").split("/")
    if place.name in HUB and not path.startswith("hf-hub:"):
        folder = place.parent if place.suffix == ".pth" else place
        return " && ".join(f"hf download {what} --local-dir {folder}" for what in HUB[place.name])
    if len(parts) in (2, 3) and parts[0][:1].isalnum():
        return f"hf download {' '.join(['/'.join(parts[:2]), *parts[2:]])}   # if that is a hub name; else correct it"
    return ""


def look(what: str, path: str, test: Callable[[Path], str | None]) -> Item:
    """One line about `path`: test(place) raises ValueError for what is wrong with it, or may return a remark."""
    if path.startswith("phantom:"):
        return "ok", what, f"{path}: built on first use", ""
    try:
        place = locate(path)
        remark = test(place)
    except ValueError as error:
        return "missing", what, str(error), fetch(path)
    return "ok", what, f"{place}{remark and f': {remark}' or ''}", ""


# --------------------------------------------------------------------------------------------------------- the checks


def check_packages(cfg: Config) -> Iterator[Item]:
    """What is installed against requirements.txt's floors."""
    from packaging.requirements import Requirement

    lines = (Path(__file__).parents[1] / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needs, bad = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())], []
    for need in needs:
        try:
            version = metadata.version(need.name)
            if not need.specifier.contains(version, prereleases=True):
                bad.append(f"{need.name} is {version}, needed {need.specifier}")
        except metadata.PackageNotFoundError:
            bad.append(f"{need.name} is not installed")
    if bad:
        yield "missing", "packages", "; ".join(bad), "pip install -r requirements.txt -c constraints.txt"
    else:
        yield "ok", "packages", f"all {len(needs)} of requirements.txt", ""


def check_data(cfg: Config) -> Iterator[Item]:
    """The first studies of each split that a run reads; their images are opened."""
    data, path = cfg.data, Path(cfg.data.path)
    if data.path.startswith("phantom:"):
        yield "ok", "data", f"{data.path}: built on first use", ""
        return
    for split in dict.fromkeys((data.sft_split, data.rl_split, data.val_split, data.test_split)):
        try:
            studies, skips = read_split(replace(data, limit=STUDIES), split)
        except ValueError as error:
            command = "" if path.is_dir() else DATA[data.format].format(path=path, up=path.parent)
            yield "missing", "data", str(error), command
            return
        skipped = f", before them skipped {describe_skips(skips)}" if skips else ""
        yield "ok", "data", f"{path} [{split}]: the first {len(studies)} studies can be read{skipped}", ""


def check_policy(cfg: Config) -> Iterator[Item]:
    """The base model's files; its family must be one that the policy code knows."""

    def test(folder: Path) -> str:
        require(folder, "config.json")
        family = read_json(folder / "config.json").get("model_type")
        if family not in PARTS:
            raise ValueError(f"{folder}: model family '{family}' is not supported; known: {', '.join(PARTS)}")
        require(folder, *TOKENIZER_FILES)
        if family != "llava_mistral":  # its original folder has no processor
            require(folder, "preprocessor_config.json", "processor_config.json")
        return f"{family}, {count_weights(folder):,} weights, every shard whole"

    yield look("policy", cfg.model.path, test)


def check_scorers(cfg: Config) -> Iterator[Item]:
    """The files of the frozen scorers of Eqs. 3, 4 and 6."""
    from appdirs import user_cache_dir

    s = cfg.scorers
    yield look("CheXbert", s.chexbert, check_torch_file)
    yield look("CheXbert", s.bert, lambda folder: check_bert(folder, weights=False))
    yield look("BERTScore", s.bertscore, lambda folder: check_bert(folder, weights=True))
    if s.expert != "oracle":
        yield look("expert", s.expert, check_open_clip)
    if cfg.eval.green:
        yield look("GREEN", cfg.eval.green, lambda folder: check_bert(folder, weights=True))
    if s.radgraph == "rules":
        yield "ok", "RadGraph", "the rule-based reader needs no file", ""
        return
    version = metadata.version("radgraph")  # of requirements.txt; its cache has a folder per version
    up = Path(s.radgraph_dir or user_cache_dir("radgraph", version=version))
    folder = up / s.radgraph
    try:
        bert = check_radgraph(folder)
    except ValueError as error:
        command = f"hf download StanfordAIMI/RRG_scorers {s.radgraph}.tar.gz --local-dir {up} && mkdir -p {folder} && "
        yield "missing", "RadGraph", str(error), f"{command}tar xzf {folder}.tar.gz -C {folder}"
        return
    yield "ok", "RadGraph", str(folder), ""
    yield look("RadGraph", bert, lambda place: check_bert(place, weights=False))


def check_java(cfg: Config) -> Iterator[Item]:
    """METEOR's jar runs in Java; only evaluate.py wants it, and it goes on without."""
    if shutil.which("java"):
        yield "ok", "Java", "there, for METEOR", ""
    else:
        yield "to do", "Java", "no `java` on PATH: the tables will lack METEOR", "apt-get install default-jre-headless"


def policy_shape(cfg: Config) -> Shape | None:
    """The policy's shape from its files, else from its published sizes; None where neither is known."""
    pixels = cfg.model.max_pixels
    try:
        folder = locate(cfg.model.path)
        return read_shape(folder, count_weights(folder), pixels)
    except (ValueError, OSError, KeyError):  # check_policy has said what is wrong with it
        shape = KNOWN.get(Path(cfg.model.path).name)
    return replace(shape, image_tokens=pixels // 784) if shape and pixels else shape  # 28 x 28 pixels a token


def check_memory(cfg: Config, shape: Shape | None) -> Iterator[Item]:
    """The estimate for each stage, against the GPU where there is one."""
    if shape is None:
        phantom = cfg.model.path.startswith("phantom:")
        text = "the phantom's models fit anywhere" if phantom else "no estimate without the policy's files"
        yield "ok" if phantom else "to do", "memory", text, ""
        return
    rows, need = [], 0.0
    for stage in range(3):
        parts = estimate(shape, cfg, stage, SCORERS)
        checkpointed = replace(cfg, model=replace(cfg.model, gradient_checkpointing=True))
        parts["checkpointed"] = estimate(shape, checkpointed, stage, SCORERS)["total"]
        rows.append(f"Stage {stage}" + "".join(f"{value / GIB:>{len(name) + 2}.1f}" for name, value in parts.items()))
        need = max(need, parts["total"])
    rows.insert(0, " " * 7 + "".join(f"  {name}" for name in parts))
    setting = f"{cfg.grpo.batch_size} studies x {cfg.rollout.group_size} candidates, micro_batch {cfg.grpo.micro_batch}"
    text = f"GiB on one GPU, an estimate: {setting}; sampling and loss take turns; the last column is the total with "
    yield "ok", "memory", "\n".join([f"{text}model.gradient_checkpointing", *(" " * 20 + r for r in rows)]), ""
    if shape.image_tokens > MAX_IMAGE_TOKENS:
        text = f"an image may take {shape.image_tokens} tokens: set model.max_pixels = 401408 for at most 512"
        yield "to do", "memory", text, ""
    if not torch.cuda.is_available():
        yield "to do", "memory", f"no GPU here: it should have at least {need / GIB:.0f} GiB", ""
        return
    have = torch.cuda.get_device_properties(0).total_memory
    text = f"the GPU has {have / GIB:.0f} GiB, the largest stage needs about {need / GIB:.0f} GiB"
    advice = ": set model.gradient_checkpointing, or lower grpo.micro_batch, grpo.micro_group or sft.micro_batch"
    yield ("ok", "memory", text, "") if need <= have else ("to do", "memory", text + advice, "")


def check_disk(cfg: Config, shape: Shape | None) -> Iterator[Item]:
    """Room for the checkpoints of the three stages, plus 1 GiB for logs and samples."""
    place = next(p for p in (Path(cfg.run).absolute(), *Path(cfg.run).absolute().parents) if p.exists())
    need, free = GIB + (checkpoint_bytes(shape, cfg) if shape else 0), shutil.disk_usage(place).free
    text = f"{cfg.run} needs about {need / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
    yield "ok" if free > need else "missing", "disk", text, ""


def preflight(cfg: Config) -> int:
    """Print the list; returns the exit code, 1 when something is missing."""
    shape = policy_shape(cfg)
    checks = (check_packages, check_data, check_policy, check_scorers, check_java)
    items = [item for check in checks for item in check(cfg)]
    items += [*check_memory(cfg, shape), *check_disk(cfg, shape)]
    for status, what, text, command in items:
        print(f"{status:<8}  {what:<10}{text}" + (f"\n{'':20}$ {command}" if command else ""))
    counts = {status: sum(item[0] == status for item in items) for status in ("ok", "missing", "to do")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["missing"] > 0)
