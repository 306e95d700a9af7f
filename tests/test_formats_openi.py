"""The main job on real Open-i studies and real X-rays, where they are at hand beside the project."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from formats.images import read_image

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("VALOR_SHARED", ROOT.parent / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "openi").is_dir(), reason=f"no real X-rays at {SHARED}"),
]
FOLDERS = ("cxr_cc0", "cxr_hannover_ccby3", "cxr_nih", "dicom", "openi")  # few files each
X_RAYS = sorted(p for name in FOLDERS for p in (SHARED / name).rglob("*") if p.suffix in (".png", ".jpg", ".dcm"))


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_every_stage_and_the_evaluation_run_on_open_i(micro, tmp_path):
    splits = ("expert", "base", "sft", "train", "val", "test")
    small = [f"--phantom.{name}={getattr(micro.phantom, name)}" for name in splits]
    small += [f"--assets.{name}={value}" for name, value in vars(micro.assets).items()]
    flags = ["--config", str(ROOT / "configs" / "openi_sample.toml"), "--data.path", str(SHARED / "openi"),
             "--run", str(tmp_path / "run"), "--assets-dir", micro.assets_dir, "--device", "cpu", *small]  # fmt: skip
    out = run(str(ROOT / "train.py"), *flags, cwd=tmp_path)
    assert "skipped" in out and "no image file" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "stage2" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and "reward/total" in rows[0]
    assert "stage2" in run(str(ROOT / "evaluate.py"), *flags, "--policy", "sft,stage2", cwd=tmp_path)
    results = json.loads((tmp_path / "run" / "eval" / "test" / "stage2" / "results.json").read_text())
    assert results["settings"]["n"] >= 2


def test_one_image_becomes_one_report(micro, tmp_path):
    base = next(Path(micro.assets_dir).glob("*/base"))
    flags = ["--run", str(tmp_path), "--model.path", str(base), "--device", "cpu"]
    dicom = next(p for p in X_RAYS if p.suffix == ".dcm")
    run(str(ROOT / "evaluate.py"), "--image", str(dicom), "--policy", "base", *flags, cwd=tmp_path)
    assert Path(f"{tmp_path}/images/{dicom.resolve()}.txt").exists()


@pytest.mark.parametrize("path", X_RAYS, ids=lambda p: p.name)
def test_every_real_x_ray_is_read_and_reported_on(path, micro):
    from model import load_policy
    from phantom.cache import asset_dir
    from rollout import generate_reports

    image = read_image(path)
    assert image.mode == "RGB" and min(image.size) > 100
    cfg = replace(micro, model=replace(micro.model, path=str(asset_dir(micro) / "base")))
    [[text]] = generate_reports(*load_policy(cfg), [[image]], cfg, ids=[path.name])
    assert isinstance(text, str)
