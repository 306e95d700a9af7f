"""DPO: the loss by hand, the update on a tiny policy, the stage on the smallest phantom."""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from config import DPOConfig
from data import load_studies
from dpo import dpo_loss
from formats.preferences import load_pairs
from model import completion_logps, sampling_rules, tokenize_reports
from phantom.assets import resolve
from rewards import wrap
from running import parallel
from running.log import Log
from sft import encode_pairs, text_logps

ROOT = Path(__file__).parents[1]
REPORTS = ["The heart is enlarged.", "Small left pleural effusion.", "No acute disease.", "Edema.", "Clear lungs."]

# ------------------------------------------------------------------------------------------------------------ the loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_loss_and_statistics_by_hand():
    # pair 1: 0.5 * (-1 + 2) = 0.5 against 0.5 * (-3 + 2) = -0.5; pair 2: 0.5 * (-6 + 4) = -1 against 0.5 * (-1 + 3) = 1
    given = [torch.tensor(x) for x in ([-1.0, -6.0], [-3.0, -1.0], [-2.0, -4.0], [-2.0, -3.0])]
    first, second = -math.log(sigmoid(1)), -math.log(sigmoid(-2))
    loss, stats = dpo_loss(*given, beta=0.5)
    assert loss.item() == pytest.approx((first + second) / 2)
    assert stats == pytest.approx({"accuracy": 0.5, "margin": -0.5, "chosen_reward": -0.25, "rejected_reward": 0.25})
    weighted, same = dpo_loss(*given, beta=0.5, weights=torch.tensor([0.75, 1.25]))
    assert weighted.item() == pytest.approx((0.75 * first + 1.25 * second) / 2) and same == stats


def test_where_policy_and_reference_agree_the_loss_is_log_2_times_the_mean_weight():
    chosen, rejected, weights = torch.tensor([-30.5, -2.25]), torch.tensor([-7.0, -11.5]), torch.tensor([0.75, 1.0])
    loss, stats = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1, weights=weights)
    assert loss.item() == pytest.approx(0.875 * math.log(2), abs=1e-7)
    assert stats == {"accuracy": 0, "margin": 0, "chosen_reward": 0, "rejected_reward": 0}


def test_the_gradient_is_that_of_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    *logps, weights = (torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(5))
    chosen, rejected, ref_chosen, ref_rejected = logps
    z = 0.3 * ((chosen - rejected) - (ref_chosen - ref_rejected))
    plain = -(weights.detach() * (1 / (1 + (-z).exp())).log()).sum() / 6
    expected = torch.autograd.grad(plain, [chosen, rejected])
    loss, _ = dpo_loss(*logps, beta=0.3, weights=weights.detach())
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close([chosen.grad, rejected.grad], list(expected), rtol=1e-12, atol=0)
    assert ref_chosen.grad is None and ref_rejected.grad is None


def test_a_margin_far_from_zero_stays_finite():
    zero = torch.zeros(1)
    logps = torch.tensor([-5000.0], requires_grad=True)
    loss, _ = dpo_loss(logps, zero, zero, zero, beta=1.0)
    loss.backward()
    assert loss.item() == 5000 and logps.grad.item() == -1
    assert dpo_loss(zero, logps, zero, zero, beta=1.0)[0].item() == 0


# ---------------------------------------------------------------------------------------------------------- the update


def write_pairs(cfg, folder: Path) -> Path:
    """8 text pairs of studies of the RL split, and a visual pair of each of the first 2."""
    studies, rows = load_studies(cfg.data, "train"), []
    for i, study in enumerate(studies[:8]):
        rows.append({"id": study.id, "chosen": REPORTS[i % 2], "rejected": REPORTS[2 + i % 3], "weight": i / 8})
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        rows.append({"id": studies[i].id, "chosen": REPORTS[i], "rejected": REPORTS[i], "weight": 1,
                     "rejected_image": f"{i}.png"})  # fmt: skip
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(micro, tmp_path_factory):
    """A run of DPO in four updates, before which the SFT policy that it needs is trained."""
    root = tmp_path_factory.mktemp("dpo")
    cfg = replace(micro, run=str(root / "run"), stage="dpo", rollout=replace(micro.rollout, max_new_tokens=40))
    cfg = resolve(cfg)
    cfg.dpo = DPOConfig(str(write_pairs(cfg, root)), steps=4, batch_size=4, micro_batch=2, lr=1e-2, weighted=True)
    train.train(cfg)
    return cfg


@pytest.fixture
def loaded(finished):
    """(model away from its reference, processor, optimizer, pairs) to try updates on."""
    run = Path(finished.run)
    model, processor, scorers, optimizer = train.load_stage(finished, "dpo", run / "dpo/adapter", run / "sft/adapter")
    assert scorers is None
    return model, processor, optimizer, load_pairs(finished.dpo.pairs, load_studies(finished.data, "train"), True)


def sums(model, processor, pairs, cfg) -> torch.Tensor:
    """Log-probs (n, 2) of n pairs' two reports."""
    inputs, texts = encode_pairs(model, processor, pairs, cfg)
    with torch.no_grad():
        return text_logps(model, processor, inputs, texts, cfg)[0].sum(dim=1).view(-1, 2)


def test_one_prefix_for_both_reports_is_as_good_as_two(loaded, finished):
    model, processor, _, pairs = loaded
    some = pairs[:3]
    inputs, texts = encode_pairs(model, processor, some, finished)
    assert len(inputs["input_ids"]) == 3 and len(texts) == 6
    assert texts[:2] == [wrap(some[0].chosen), wrap(some[0].rejected)]
    apart = [pair._replace(rejected_image=pair.images[0]) for pair in some]  # the same image, read twice
    assert len(encode_pairs(model, processor, apart, finished)[0]["input_ids"]) == 6
    shared = sums(model, processor, some, finished)
    torch.testing.assert_close(sums(model, processor, apart, finished), shared, atol=1e-4, rtol=1e-5)
    rules = replace(sampling_rules(model, processor, finished), min_new_tokens=0)
    for i, pair in enumerate(some):  # and as each report alone, whose EOS counts
        alone = encode_pairs(model, processor, [pair], finished)[0]
        for j, text in enumerate((pair.chosen, pair.rejected)):
            ids, mask, _ = tokenize_reports(processor, [wrap(text)], 99, model.device, rules.banned_ids)
            assert ids[0, -1] == processor.tokenizer.eos_token_id
            with torch.no_grad():
                logps = completion_logps(model, alone, ids, mask, rules)  # (1, T)
            assert logps.sum().item() == pytest.approx(shared[i, j].item(), abs=1e-3)


def test_the_rejected_side_of_a_visual_pair_sees_its_own_image(loaded, finished):
    model, processor, _, pairs = loaded
    visual = pairs[-1]
    assert visual.rejected_image and visual.chosen == visual.rejected
    [[chosen, rejected]] = sums(model, processor, [visual], finished).tolist()
    swapped = visual._replace(images=[visual.rejected_image], rejected_image=visual.images[0])
    assert abs(chosen - rejected) > 1e-4
    assert sums(model, processor, [swapped], finished).tolist()[0] == pytest.approx([rejected, chosen], abs=1e-4)


def gradient(loaded, cfg, batch, monkeypatch) -> tuple[torch.Tensor, float]:
    """(gradient summed over the pairs of `batch`, what the update would divide it by)."""
    model, processor, optimizer, _ = loaded
    taken = {}

    def keep(optimizer, max_norm, divide_by):
        taken["sum"] = torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]])
        taken["by"] = divide_by
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    monkeypatch.setattr(parallel, "optimizer_step", keep)
    train.dpo_update(model, processor, optimizer, batch, cfg, 1, 4)
    return taken["sum"], taken["by"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_do_not_depend_on_the_micro_batch(loaded, finished, size, monkeypatch):
    batch = loaded[3][:4] + loaded[3][-2:]  # text and visual pairs
    whole, by = gradient(loaded, replace(finished, dpo=replace(finished.dpo, micro_batch=6)), batch, monkeypatch)
    small = replace(finished, dpo=replace(finished.dpo, micro_batch=size))
    split, same = gradient(loaded, small, batch[::-1], monkeypatch)
    assert by == same == 6 and whole.norm() > 1e-3
    assert (split - whole).norm() < 1e-5 * whole.norm()


def test_two_processes_halves_add_up_to_the_whole(loaded, finished, monkeypatch):
    batch = loaded[3][:3] + loaded[3][-2:]
    whole, by = gradient(loaded, finished, batch, monkeypatch)
    halves = [gradient(loaded, finished, batch[rank::2], monkeypatch) for rank in (0, 1)]
    assert by == 5 == sum(n for _, n in halves)
    assert (halves[0][0] + halves[1][0] - whole).norm() < 1e-5 * whole.norm()


def test_weights_weigh(loaded, finished, monkeypatch):
    a, b = (pair._replace(weight=1.0) for pair in loaded[3][:2])
    single = [gradient(loaded, finished, [pair], monkeypatch)[0] for pair in (a, b)]
    both, _ = gradient(loaded, finished, [a._replace(weight=0.5), b._replace(weight=2.0)], monkeypatch)
    assert (both - 0.5 * single[0] - 2 * single[1]).norm() < 1e-5 * both.norm()


def test_a_broken_reference_policy_is_named(loaded, finished):
    model, processor, optimizer, pairs = loaded
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("lora_B.ref.weight")).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: is the reference's adapter whole"):
        train.dpo_update(model, processor, optimizer, pairs[:2], finished, 0, 4)


# ----------------------------------------------------------------------------------------------------------- the stage


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without the seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_stage_leaves_what_the_others_leave(finished):
    run = Path(finished.run)
    names = {path.name for path in (run / "dpo").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "tb", "adapter"} <= names
    table = rows(run / "dpo")
    assert [row["k"] for row in table] == [1, 2, 3, 4] and len(rows(run / "sft")) == 4
    wanted = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "grad_norm", "lr"}
    assert all(wanted <= row.keys() for row in table)
    assert json.loads((run / "dpo/adapter/trainer_state.json").read_text()) == {"stage": "dpo", "k": 4, "seed": 0}
    cosine = [1e-2 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]  # 3% of 4 updates is no warm-up
    assert [row["lr"] for row in table] == pytest.approx(cosine)
    assert not same(weights(run / "dpo"), weights(run / "sft"))


def test_it_starts_at_the_reference_policy_and_leaves_it_for_the_chosen_reports(finished):
    first, *_, last = rows(Path(finished.run) / "dpo")
    assert first["margin"] == first["chosen_reward"] == first["rejected_reward"] == first["accuracy"] == 0
    mean = first["loss"] / math.log(2)  # of the batch's weights
    assert 0.75 <= mean <= 1.25
    assert last["margin"] > 0


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_stage_ends_with_the_same_weights(finished, tmp_path, monkeypatch, stop_after):
    run, sft = tmp_path / "run", str(Path(finished.run) / "sft")
    cfg = replace(finished, run=str(run), init_from=sft, reference=sft)
    write = Log.write

    def dying_write(self, k, row, sample=None):
        write(self, k, row, sample)
        if k == stop_after + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "write", dying_write)
    with pytest.raises(KeyboardInterrupt):
        train.train(cfg)
    assert len(rows(run / "dpo")) == stop_after + 1
    monkeypatch.setattr(Log, "write", write)
    train.train(cfg)
    assert same(weights(run / "dpo"), weights(Path(finished.run) / "dpo"))
    assert rows(run / "dpo") == rows(Path(finished.run) / "dpo")


def test_a_finished_stage_is_not_done_again_and_other_settings_are_refused(finished, capsys):
    train.train(replace(finished, dpo=replace(finished.dpo, micro_batch=1)))  # which changes no result
    assert "dpo is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="dpo.beta = 0.3, now it is 0.2"):
        train.train(replace(finished, dpo=replace(finished.dpo, beta=0.2)))


def test_a_branch_has_a_name_of_its_own(finished):
    steps = replace(finished.dpo, steps=1, weighted=False)
    train.train(replace(finished, name="naive", dpo=steps))
    [row] = rows(Path(finished.run) / "naive")
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)  # plain DPO: each weight is 1
    with pytest.raises(ValueError, match="--name dpo: in a run this is the name of something else"):
        train.train(replace(finished, stage="1", name="dpo"))


def test_a_fault_in_the_pairs_is_said_before_stage_0(finished, tmp_path):
    for name, said in (("", "dpo.pairs is empty"), ("no.jsonl", "no.jsonl: cannot be read")):
        pairs = replace(finished.dpo, pairs=name and str(tmp_path / name))
        with pytest.raises(ValueError, match=said):
            train.train(replace(finished, run=str(tmp_path / f"run_{name}"), dpo=pairs))
    assert not list(tmp_path.glob("*/sft/metrics.jsonl"))


def test_it_asks_for_no_scorer(finished):
    assert train.needed_assets(finished) == ("data", "base")


SCRIPT = """
import pickle, sys
from running import parallel
import train
parallel.start("cpu", 1)
load = train.load_stage
def loaded(*given):
    found = load(*given)
    print("sharded:", sum(hasattr(p, "full_tensor") for p in found[0].parameters()))
    return found
train.load_stage = loaded
train.train(pickle.load(open(sys.argv[1], "rb")))
parallel.stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_as_one(finished, tmp_path, fsdp):
    run, sft = tmp_path / "run", str(Path(finished.run) / "sft")
    cfg = replace(finished, run=str(run), init_from=sft, reference=sft, fsdp=fsdp)
    (tmp_path / "cfg").write_bytes(pickle.dumps(cfg))
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, str(tmp_path / "script.py"), str(tmp_path / "cfg")], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert fsdp == (int(done.stdout.split("sharded: ")[1].split()[0]) > 10)
    for one, two in zip(rows(Path(finished.run) / "dpo"), rows(run / "dpo"), strict=True):
        assert one == pytest.approx(two, abs=1e-4, rel=1e-3)
