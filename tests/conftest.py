"""A tiny LLaVA with the phantom's own tokenizer and processor: random weights, milliseconds per forward pass."""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from config import (
    Config,
    DataConfig,
    EvalConfig,
    GRPOConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    StageConfig,
)
from model import load_policy
from phantom import assets, cache
from phantom.config import AssetsConfig, PhantomConfig
from tiny import models as tiny_models

torch.set_num_threads(1)

CORPUS = [
    "FINDINGS: Small left pleural effusion. The heart is enlarged. IMPRESSION: Cardiomegaly.",
    "FINDINGS: The lungs are clear. No pleural effusion. IMPRESSION: No acute disease.",
    "Write the report. USER ASSISTANT right lower lobe consolidation, edema, pneumothorax.",
]


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """Folder of a random tiny LLaVA (32 wide, 2 + 2 layers, 4 image tokens) with processor."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_models.policy_tokenizer(CORPUS, vocab_size=400)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    tiny_models.new_processor(tokenizer, 32).save_pretrained(folder)
    return folder


@pytest.fixture
def cfg(base_dir):
    """Config of the tiny model: groups of 4, at most 12 new tokens."""
    return Config(
        device="cpu",
        data=DataConfig(path="unused"),
        model=ModelConfig(path=str(base_dir), lora_r=4, lora_alpha=8),
        rollout=RolloutConfig(group_size=4, min_new_tokens=2, max_new_tokens=12),
    )


@pytest.fixture
def policy(cfg):
    """(model with a LoRA adapter that is not zero, processor)."""
    model, processor = load_policy(cfg, new_lora=True)
    randomise(model)
    return model, processor


def randomise(model, scale: float = 0.3, seed: int = 1) -> None:
    """Give LoRA's B matrices, which start at 0, values: an adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def make_images(n: int) -> list[Image.Image]:
    """n different grey pictures."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).convert("RGB") for _ in range(n)]


@pytest.fixture
def images():
    """Three different grey pictures."""
    return make_images(3)


@pytest.fixture(scope="session")
def real_reports():
    """40 reports of Open-i, where they are at hand beside the project."""
    shared = Path(os.environ.get("VALOR_SHARED", Path(__file__).parents[2] / "shared" / "data"))
    if not (shared / "openi" / "annotation.json").is_file():
        pytest.skip(f"no real reports at {shared}")
    splits = json.loads((shared / "openi" / "annotation.json").read_text(encoding="utf-8"))
    return list(dict.fromkeys(row["report"] for rows in splits.values() for row in rows))[:40]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, {file in the repository: path}): puts a repository into an empty hub cache, as a download would."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, files: dict) -> None:
        folder, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        for file, path in files.items():
            copy = folder / "snapshots" / commit / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)

    return put


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """The whole phantom at its smallest: every asset really built, in two updates each. Nothing is learnt."""
    root = tmp_path_factory.mktemp("micro")
    cfg = Config(
        run=str(root / "run"),
        assets_dir=str(root / "assets"),
        device="cpu",
        save_every=2,
        sample_every=2,
        assets=AssetsConfig(vision_steps=2, base_steps=2, expert_steps=2, labeller_steps=2),
        phantom=PhantomConfig(expert=40, base=40, sft=12, train=12, val=6, test=8),
        rollout=RolloutConfig(group_size=3, max_new_tokens=16),
        rewards=RewardConfig(k_clin=2),
        sft=SFTConfig(steps=4, batch_size=4),
        grpo=GRPOConfig(batch_size=3),
        stage1=StageConfig(steps=4),
        stage2=StageConfig(steps=2, trainable="language+projector"),
        eval=EvalConfig(batch_size=8, samples=2, bootstrap=50, gate=0),
    )
    for name in cache.NAMES:
        assets.ensure(cfg, name)
    return cfg
