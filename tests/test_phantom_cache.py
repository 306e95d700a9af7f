"""The assets' cache: what its key holds, that a build depends on nothing else, and that each is built once."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError

import data
from config import Config, flatten, to_dict
from phantom import assets, cache
from phantom.config import AssetsConfig, PhantomConfig, Recipe
from running.folder import atomic_folder

SMALL = {
    "phantom": PhantomConfig(expert=6, base=16, sft=2, train=2, val=2, test=2),
    "assets": AssetsConfig(vision_steps=1, base_steps=1, expert_steps=1, labeller_steps=1),
    "device": "cpu",
}


def contents(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of every file below a folder, locks left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (tuple, list)):
        return [*value, "OTHER"]
    return value + (0.01 if isinstance(value, float) else 1 if isinstance(value, int) else "x")


def with_field(cfg: Config, name: str, value) -> Config:
    """`cfg` with the field `name`, e.g. "rollout.top_p", at another value."""
    table, _, key = name.rpartition(".")
    return replace(cfg, **{table: replace(getattr(cfg, table), **{key: value})} if table else {name: value})


def test_the_key_is_the_recipe_field_by_field():
    cfg, changing = Config(), set()
    for name, value in flatten(to_dict(cfg)).items():
        if name != "assets_dir" and cache.asset_dir(with_field(cfg, name, other(value))) != cache.asset_dir(cfg):
            changing.add(name)
    tables = {"phantom": PhantomConfig, "assets": AssetsConfig}
    assert changing == {"assets_seed"} | {f"{t}.{f.name}" for t, cls in tables.items() for f in dataclasses.fields(cls)}
    assert str(cache.asset_dir(cfg)) == "assets/phantom-12d7f996"  # else what is cached is of no use


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Config of the smallest recipe, of which every asset is built, with all other settings at their defaults."""
    cfg = Config(assets_dir=str(tmp_path_factory.mktemp("assets")), **SMALL)
    for name in cache.NAMES:
        assets.ensure(cfg, name)
    return cfg


def test_a_build_depends_on_the_recipe_alone(built, tmp_path):
    """All settings that the recipe does not hold, changed at once: the same bytes, from one thread or from two."""
    cfg = replace(built, assets_dir=str(tmp_path), threads=2, seed=7)
    cfg = with_field(cfg, "data.prompt", "Describe the film at some length, please.")
    cfg = with_field(cfg, "rollout.max_new_tokens", 5)
    cfg = with_field(cfg, "rollout.temperature", 0.3)
    cfg = with_field(cfg, "data.limit", 3)
    cfg = with_field(cfg, "data.target", "impression")
    cfg = with_field(cfg, "model.gradient_checkpointing", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    state = torch.manual_seed(12345).get_state()
    try:
        for name in reversed(cache.NAMES):  # nor on what was built before
            assets.ensure(cfg, name)
        assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)  # the caller's own
    finally:
        torch.set_num_threads(threads)
    old, new = contents(Path(built.assets_dir)), contents(tmp_path)
    assert old.keys() == new.keys() and [name for name in old if old[name] != new[name]] == []


def build_all(cfg: Config, log: Path) -> None:
    """In a process of its own: every asset, and what was said."""
    with log.open("w") as file, contextlib.redirect_stdout(file):
        for name in cache.NAMES:
            assets.ensure(cfg, name)


def test_two_processes_at_once_build_what_one_builds(built, tmp_path):
    """Both want every asset: each is built by one of them, and comes out as it did from a single process."""
    cfg, fork = replace(built, assets_dir=str(tmp_path / "assets")), multiprocessing.get_context("fork")
    logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    workers = [fork.Process(target=build_all, args=(cfg, log)) for log in logs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    said = [line for log in logs for line in log.read_text().splitlines() if line.startswith("building ")]
    assert sorted(Path(line.split()[1]).name for line in said) == sorted(cache.NAMES)
    old, new = contents(Path(built.assets_dir)), contents(tmp_path / "assets")
    assert old.keys() == new.keys() and [name for name in old if old[name] != new[name]] == []


DAMAGES = {  # file of an asset -> what it holds instead, None: nothing, b"cut": half of what it held
    "data/annotation.json": (None, b"", b"{}", b"[]", b"cut"),
    "data/truth.jsonl": (None,),
    "data/images": (None,),
    "base/config.json": (None, b"", b"{}", b"cut"),
    "base/model.safetensors": (None, b"", b"cut", b"version https://git-lfs.github.com/spec/v1"),
    "base/processor_config.json": (None, b"{"),
    "base/tokenizer.json": (None, b"", b"cut"),
    "base/quality.json": (b"{}",),
    "expert/open_clip_config.json": (None, b"cut"),
    "expert_noisy/open_clip_model.safetensors": (None, b"cut"),
    "labeller/chexbert.pth": (None, b"", b"cut", b"no zip"),
    "labeller/model.safetensors": (b"cut",),
    "labeller/quality.json": (b"[1, 2]", b"{", b"[" * 2000),
}


@pytest.mark.parametrize("file", DAMAGES)
def test_a_damaged_asset_is_named_in_one_line_and_built_anew_when_deleted(built, tmp_path, file):
    cfg, name = replace(built, assets_dir=str(tmp_path)), file.split("/")[0]
    shutil.copytree(cache.asset_dir(built), cache.asset_dir(cfg))
    folder, path = cache.asset_dir(cfg) / name, cache.asset_dir(cfg) / file
    assert assets.ensure(cfg, name) == folder
    for damage in DAMAGES[file]:
        whole = path.rename(tmp_path / "whole")
        if damage is not None:
            path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2] if damage == b"cut" else damage)
        with pytest.raises(ValueError, match=f"^{folder} is damaged .*; delete it, and it is built anew$") as refused:
            cache.resolve(replace(cfg, model=replace(cfg.model, path=f"phantom:{name}")), (name,), {})
        assert "\n" not in str(refused.value)
        path.unlink(missing_ok=True)
        whole.rename(path)
    shutil.rmtree(folder)
    folder.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=f"^{folder} is damaged"):
        assets.ensure(cfg, name)
    folder.unlink()
    assert cache.ensure(cfg, name, fake_builders(calls := [])) == folder and calls == [name]


def test_a_build_meets_a_damaged_image_with_one_line(built, tmp_path):
    cfg = replace(built, assets_dir=str(tmp_path))
    shutil.copytree(cache.asset_dir(built) / "data", cache.asset_dir(cfg) / "data")
    image = cache.asset_dir(cfg) / "data" / "images" / "base00003" / "0.png"
    image.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"phantom-.*/data \[base\].*\(base00003\)"):
        assets.ensure(cfg, "base")
    assert not (cache.asset_dir(cfg) / "base").exists()
    shutil.rmtree(image.parent)
    with pytest.raises(ValueError, match="data is damaged .images: less than 30 folders.; delete it"):
        assets.ensure(cfg, "base")


def test_a_full_disk_ends_a_build_with_one_line_and_the_next_one_is_whole(tmp_path):
    cfg = Config(assets_dir=str(tmp_path))
    for full in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):
        with pytest.raises(OSError, match=r"labeller: 7,500,000 bytes cannot be written \(.*No space left") as refused:
            cache.ensure(cfg, "labeller", {"labeller": mock.Mock(side_effect=full)})
        assert "\n" not in str(refused.value) and not list(tmp_path.rglob("labeller*/"))
    assert cache.ensure(cfg, "labeller", fake_builders([])).is_dir()


def fake_builders(calls: list[str]) -> dict:
    """Builders that only write down whom they were asked for."""

    def build(recipe: Recipe, folder: Path, name: str) -> None:
        assert isinstance(recipe, Recipe) and folder.is_dir()
        calls.append(name)

    return {name: lambda recipe, folder, name=name: build(recipe, folder, name) for name in cache.NAMES}


def test_only_what_is_needed_is_built(tmp_path, monkeypatch):
    """Any subset of the assets; a path that is not needed is resolved to its folder all the same."""
    monkeypatch.setattr(cache, "check_asset", lambda folder: None)  # these are empty
    subsets = [s for n in range(5) for s in itertools.combinations(("data", "base", "expert", "labeller"), n)]
    for i, needs in enumerate(subsets):
        cfg, calls = Config(assets_dir=str(tmp_path / str(i))), []
        resolved = cache.resolve(cfg, needs, fake_builders(calls))
        folder = cache.asset_dir(cfg)
        assert set(calls) == set(needs) | ({"data"} if {"base", "expert"} & set(needs) else set())
        assert len(calls) == len(set(calls)) and all((folder / name).is_dir() for name in calls)
        assert (resolved.data.path, resolved.model.path) == (str(folder / "data"), str(folder / "base"))
        assert (resolved.scorers.expert, resolved.scorers.bert) == (str(folder / "expert"), str(folder / "labeller"))
        assert resolved.scorers.chexbert == str(folder / "labeller" / "chexbert.pth")
    assert cache.resolve(cfg, cache.NAMES, fake_builders(calls := [])) == resolved and calls == []  # all there


def test_what_no_path_names_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "check_asset", lambda folder: None)
    cfg, calls = Config(assets_dir=str(tmp_path)), []
    cfg.data.path, cfg.model.path, cfg.scorers.expert = "/data/iu", "org/model", "phantom:expert_noisy"
    resolved = cache.resolve(cfg, cache.NAMES, fake_builders(calls))
    assert (resolved.data.path, resolved.model.path) == ("/data/iu", "org/model")
    assert cfg.scorers.bert == "phantom:labeller"  # the given config stays as it is
    assert calls == ["data", "expert_noisy", "labeller"]
    cfg.data.path = "phantom:data_clean"
    cache.resolve(cfg, ("data", "expert"), fake_builders(calls := []))  # all data sets, all experts
    assert calls == ["data_clean"]


@pytest.mark.parametrize("path", ["phantom:bas", "phantom:", "phantom:..", "phantom:/etc", "phantom: base",
                                  "phantom:base/..", "phantom:base/a/../../../x", "phantom:labeller//etc/passwd"])
def test_a_path_that_is_none_of_the_phantoms_is_refused(path, tmp_path):
    for table, key in (("model", "path"), ("data", "path"), ("scorers", "bert")):
        cfg = with_field(Config(assets_dir=str(tmp_path)), f"{table}.{key}", path)
        with pytest.raises(ValueError, match=f"^{path}: (unknown; known are phantom:data, |.* leads out of )"):
            cache.resolve(cfg, (), {})


def test_a_failed_build_leaves_nothing_that_looks_complete(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "asset") as tmp:
        (tmp / "half").write_text("x")
        raise KeyboardInterrupt
    assert not (tmp_path / "asset").exists()
    with atomic_folder(tmp_path / "asset") as tmp:
        assert list(tmp.iterdir()) == []


def test_an_unknown_asset_is_refused_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["assets", "--build", "bse"])
    with pytest.raises(SystemExit) as ended:
        assets.main()
    assert ended.value.code and "expert_noisy" in "".join(capsys.readouterr())


@pytest.mark.parametrize("place", ["file", "file/below", "file\0"])
def test_a_folder_that_cannot_be_made_ends_a_build_with_one_line(monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["assets", "--build", "data", "--assets-dir", str(tmp_path / place)])
    with pytest.raises(SystemExit, match="^phantom.assets: .*(file|null byte)") as ended:
        assets.main()
    assert "\n" not in ended.value.code


def test_an_impossible_world_ends_a_build_with_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("phantom.world.sample_findings", lambda *_: (_ for _ in ()).throw(ValueError("no such world")))
    monkeypatch.setattr("sys.argv", ["assets", "--build", "data", "--assets-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="phantom.assets: no such world"):
        assets.main()


def test_the_card_of_a_data_set_builds_the_phantoms_on_first_use(monkeypatch, tmp_path, capsys):
    sizes = [f"--phantom.{split}=2" for split in ("expert", "base", "sft", "train", "val", "test")]
    monkeypatch.setattr("sys.argv", ["data.py", "--assets-dir", str(tmp_path), *sizes])
    data.main()
    (folder,) = tmp_path.glob("phantom-*/data")
    said = capsys.readouterr().out
    assert f"{folder} (format r2gen" in said and "with exact labels" in said
    assert not [path for path in folder.parent.iterdir() if path.name not in ("data", "data.lock")]  # and no model
