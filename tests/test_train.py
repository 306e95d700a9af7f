"""The loop, the run folder and the two updates, on the smallest phantom."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import train
from config import Config, RewardConfig
from data import load_studies
from model import get_base, load_policy, require_finite, sampling_rules
from phantom import world as phantom
from phantom.assets import resolve
from phantom.findings import finding_of
from rewards import compute_rewards, wrap
from running import parallel
from running.folder import claim_folder, lock
from running.log import Log, average, keep_rows
from scorers.load import load_scorers
from sft import sft_update


@pytest.fixture(scope="module", autouse=True)
def tags():
    """Tag every output, so that the babble of an untrained policy gets rewards, and gradients, at all."""
    patch = pytest.MonkeyPatch()

    def tagged(outputs, *args, **kwargs):
        return compute_rewards([list(map(wrap, group)) for group in outputs], *args, **kwargs)

    patch.setattr(train, "compute_rewards", tagged)
    yield
    patch.undo()


@pytest.fixture
def cfg(micro, tmp_path):
    return resolve(replace(micro, run=str(tmp_path / "run")))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(micro, tmp_path_factory):
    """A run of all three stages."""
    cfg = resolve(replace(micro, run=str(tmp_path_factory.mktemp("finished"))))
    train.train(cfg)
    return cfg


def test_a_run_leaves_everything_behind(finished):
    run = Path(finished.run)
    for stage, steps in (("sft", 4), ("stage1", 4), ("stage2", 2)):
        folder = run / stage
        assert {"config.json", "metrics.jsonl", "checkpoint.pt", "tb", "adapter"} <= {p.name for p in folder.iterdir()}
        assert len(rows(folder)) == steps
    assert [row["k"] for row in rows(run / "stage1")] == [1, 2, 3, 4]
    assert [row["k"] for row in rows(run / "stage2")] == [5, 6]  # k is never reset between the stages
    clinical = [row["k"] for stage in ("stage1", "stage2") for row in rows(run / stage) if "reward/chexbert" in row]
    assert clinical == [2, 4, 6]
    assert "reward/visual" in rows(run / "stage2")[0] and "reward/visual" not in rows(run / "stage1")[0]
    sample = json.loads((run / "stage2" / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["candidates"]) == 3 and {"text", "reward", "bleu4", "visual"} <= sample["candidates"][0].keys()
    assert [json.loads(line)["k"] for line in (run / "stage1" / "samples.jsonl").read_text().splitlines()] == [1, 3]


def record_of(finished, **grpo):
    """(row of samples.jsonl, weights) of one update that is recorded, and (None, weights) of one that is not."""
    cfg, results = replace(finished, grpo=replace(finished.grpo, lr=0.02, **grpo)), []
    init, sft = (Path(finished.run) / stage / "adapter" for stage in ("stage1", "sft"))
    for record in (True, False):
        model, processor, scorers, optimizer = train.load_stage(cfg, 1, init, sft)
        batch, state = load_studies(cfg.data, "train")[:3], torch.get_rng_state()
        given = dict(k=2, stage=1, record=record)
        sample = train.grpo_update(model, processor, scorers, optimizer, batch, cfg, **given)[1]
        assert torch.equal(torch.get_rng_state(), state)
        results += [sample, {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}]
    return results


def test_recording_a_group_changes_nothing(finished):
    sample, weights_of_one, nothing, weights_of_other = record_of(finished)
    assert nothing is None and same(weights_of_one, weights_of_other)
    assert len(sample["greedy"]) == 2 and len(sample["candidates"]) == 3
    for candidate in sample["candidates"]:
        # the text is in front of its tags, which the test adds behind the sampler
        assert sum(candidate["pieces"]) == len(candidate["text"]) and len(candidate["pieces"]) == len(candidate["kl"])
        assert set(candidate["ratio"]) == {1.0} and candidate["clipped"] == []  # one step a batch
        assert min(candidate["kl"]) >= 0
    assert any(x > 0 for candidate in sample["candidates"] for x in candidate["kl"])
    rewards = torch.tensor([candidate["reward"] for candidate in sample["candidates"]])
    moved = torch.tensor([np.mean(candidate["moved"]) for candidate in sample["candidates"]])
    assert (train.group_advantages(rewards) * moved).sum() > 0.01  # the better ones have become likelier


def test_a_recorded_group_tells_what_the_clipping_left_out(finished):
    sample = record_of(finished, num_iterations=3, micro_batch=2, micro_group=2)[0]
    rewards = torch.tensor([[candidate["reward"] for candidate in sample["candidates"]]])
    for candidate, a in zip(sample["candidates"], train.group_advantages(rewards)[0].tolist(), strict=True):
        outside = [i for i, r in enumerate(candidate["ratio"]) if a > 0 and r > 1.2 or a < 0 and r < 0.8]
        assert candidate["clipped"] == outside
    assert any(r != 1 for candidate in sample["candidates"] for r in candidate["ratio"])
    assert any(candidate["clipped"] for candidate in sample["candidates"])


def test_kl_is_zero_at_the_first_update_of_stage_1_alone(finished):
    run = Path(finished.run)
    assert rows(run / "stage1")[0]["kl"] == 0.0
    assert rows(run / "stage2")[0]["kl"] > 0.0  # it starts from Stage 1's policy, the reference stays SFT's
    assert all(row["clipfrac"] == 0 for row in rows(run / "stage1"))  # one update per rollout: the ratio is 1


def test_adapters_load_with_peft_and_hold_the_whole_policy(finished):
    base, _ = load_policy(finished)
    loaded = peft.PeftModel.from_pretrained(base, Path(finished.run) / "stage2" / "adapter")
    names = [name for name, _ in loaded.named_parameters() if "lora_" in name]
    assert any("multi_modal_projector" in n for n in names) and any("language_model" in n for n in names)
    assert len(weights(Path(finished.run) / "stage2")) == len(names)


def test_each_stage_trains_what_it_says(finished):
    run = Path(finished.run)
    sft, stage1, stage2 = weights(run / "sft"), weights(run / "stage1"), weights(run / "stage2")
    moved = {name for name in sft if not torch.equal(sft[name], stage1[name])}
    assert moved and all("multi_modal_projector" not in name for name in moved)
    assert any("multi_modal_projector" in name for name in stage1 if not torch.equal(stage1[name], stage2[name]))


def test_the_same_seed_gives_the_same_run(finished, micro, tmp_path):
    cfg = resolve(replace(micro, run=str(tmp_path / "again")))
    train.train(cfg)
    assert all(same(weights(Path(cfg.run) / s), weights(Path(finished.run) / s)) for s in ("sft", "stage1", "stage2"))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_stage_ends_with_the_same_weights(finished, cfg, monkeypatch, stop_after):
    write, run = Log.write, Path(cfg.run)

    def dying_write(self, k, row, sample=None):
        write(self, k, row, sample)
        if self.folder.name == "stage1" and k == stop_after + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "write", dying_write)
    with pytest.raises(KeyboardInterrupt):
        train.train(cfg)
    assert len(rows(run / "stage1")) == stop_after + 1  # rows beyond the checkpoint exist and must not stand twice
    monkeypatch.setattr(Log, "write", write)
    train.train(cfg)
    for stage in ("sft", "stage1", "stage2"):
        assert same(weights(run / stage), weights(Path(finished.run) / stage)), stage
        drop = ("seconds",)
        theirs = [{k: v for k, v in row.items() if k not in drop} for row in rows(Path(finished.run) / stage)]
        assert [{k: v for k, v in row.items() if k not in drop} for row in rows(run / stage)] == theirs


def test_two_branches_start_from_one_checkpoint(finished, capsys):
    branch = replace(finished, stage="2", name="stage1_continued", rewards=replace(finished.rewards, lambda_vis=0.0))
    train.train(branch)
    run = Path(finished.run)
    assert "visual" not in json.dumps(rows(run / "stage1_continued"))
    a = (run / "stage2" / "samples.jsonl").read_text().splitlines()[0]
    b = (run / "stage1_continued" / "samples.jsonl").read_text().splitlines()[0]
    texts = [[c["text"] for c in json.loads(line)["candidates"]] for line in (a, b)]
    assert texts[0] == texts[1]  # same policy, same study, same random numbers


def test_validation_passes_are_logged_and_change_nothing(finished, cfg):
    watched = replace(from_sft(finished, cfg), val_every=2)
    train.train(watched)
    logged = [row["k"] for row in rows(Path(cfg.run) / "stage1") if "val/bleu_4" in row]
    assert logged == [2, 4]
    assert same(weights(Path(cfg.run) / "stage1"), weights(Path(finished.run) / "stage1"))


def test_the_oracle_takes_the_experts_place(finished):
    oracle = replace(finished, scorers=replace(finished.scorers, expert="oracle"))
    adapter = Path(finished.run) / "sft" / "adapter"
    scorers = train.load_stage(oracle, 2, adapter, adapter)[2]
    study = load_studies(finished.data, "train")[0]
    said = phantom.write_report([finding_of(n, np.random.default_rng(0)) for n in study.labels],
                                np.random.default_rng(0), finished.phantom, noisy=False)[0]  # fmt: skip
    s = scorers.similarity([None], [study.id], [[said, "<report>"]])
    assert s[0, 0] == pytest.approx(1) and s.shape == (1, 2)


def from_sft(finished, cfg, stage="1"):
    """Stage 1 in a run of its own from `finished`'s SFT policy, which is its KL reference too."""
    sft = str(Path(finished.run) / "sft")
    return replace(cfg, stage=stage, init_from=sft, reference=sft)


def test_init_from_skips_the_earlier_stages(finished, cfg, capsys):
    train.train(from_sft(finished, cfg))
    assert not (Path(cfg.run) / "sft").exists()
    assert same(weights(Path(cfg.run) / "stage1"), weights(Path(finished.run) / "stage1"))
    assert f"the KL is taken to {finished.run}/sft/adapter" in capsys.readouterr().out


def test_init_from_must_say_its_stage_and_its_reference(finished, cfg):
    with pytest.raises(ValueError, match="init_from starts one stage.*--stage 0, 1 or 2"):
        train.train(from_sft(finished, cfg, stage="all"))
    with pytest.raises(ValueError, match="by --reference, for the KL"):
        train.train(replace(from_sft(finished, cfg), reference=""))
    assert not list(Path(cfg.run).glob("*/adapter"))


def test_a_stage_builds_only_the_assets_that_it_reads():
    text = Config(rewards=RewardConfig(lambda_vis=0.0))
    assert train.needed_assets(Config(stage="0")) == ("data", "base")
    assert train.needed_assets(Config(stage="1")) == train.needed_assets(text) == ("data", "base", "labeller")
    assert {"expert", "labeller"} < set(train.needed_assets(Config(stage="2"))) == set(train.needed_assets(Config()))


def test_references_that_fail_the_format_themselves_end_the_run_before_it_begins(cfg):
    findings = replace(cfg, data=replace(cfg.data, target="findings"))
    with pytest.raises(ValueError, match="12 of 12 references lack 'FINDINGS:' and 'IMPRESSION:' exactly once"):
        train.train(findings)
    assert not (Path(cfg.run) / "sft" / "metrics.jsonl").exists()
    train.train(replace(findings, stage="0"))  # SFT alone has no format reward


def test_a_run_folder_refuses_other_settings(finished, tmp_path):
    other = replace(finished, stage="1", grpo=replace(finished.grpo, lr=1e-9))
    with pytest.raises(ValueError, match="grpo.lr = 0.0015, now it is 1e-09"):
        train.train(other)
    free = replace(finished, stage="0", save_every=9, threads=2, device="cpu")
    claim_folder(Path(finished.run) / "stage1", free)


def test_a_run_of_an_earlier_version_goes_on(finished, tmp_path, capsys):
    """A field that was removed since is named and ignored, one that was added since has its default."""
    shutil.copytree(Path(finished.run) / "stage1", tmp_path / "stage1")
    recorded = json.loads((tmp_path / "stage1" / "config.json").read_text())
    recorded["grpo"]["gone"] = recorded["lost"] = 1
    del recorded["reference"], recorded["grpo"]["eps_low"]
    (tmp_path / "stage1" / "config.json").write_text(json.dumps(recorded))
    claim_folder(tmp_path / "stage1", finished)
    assert "settings of an earlier version are ignored: grpo.gone, lost" in capsys.readouterr().out
    with pytest.raises(ValueError, match="grpo.eps_low = 0.2, now it is 0.3"):
        claim_folder(tmp_path / "stage1", replace(finished, grpo=replace(finished.grpo, eps_low=0.3)))


def test_a_start_that_failed_before_its_first_update_does_not_bind_the_folder(finished, cfg):
    right = from_sft(finished, cfg)
    with pytest.raises(ValueError, match="no such folder"):
        train.train(replace(right, init_from=str(Path(cfg.run) / "nowhere" / "adapter")))
    train.train(right)
    assert (Path(cfg.run) / "stage1" / "adapter").exists()


def started(monkeypatch, *flags) -> str:
    """What `train.py FLAGS` ends with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as end:
        train.main()
    return str(end.value)


@pytest.mark.parametrize("flags, said", [
    (["--stage", "2"], "by --scorers.chexbert, --scorers.bert, --scorers.bertscore, "
     "--scorers.expert, --scorers.radgraph$"),
    (["--stage", "1", "--scorers.chexbert", "x", "--scorers.bert", "b"], "by --scorers.bertscore, --scorers.radgraph$"),
    (["--stage", "all", "--rewards.lambda-vis", "0"], "by .*--scorers.bertscore, --scorers.radgraph$"),
])  # fmt: skip
def test_the_phantoms_scorers_do_not_train_on_real_reports(flags, said, tmp_path, monkeypatch):
    """Before a weight is read or an asset is built: neither folder is there."""
    run = ["--run", str(tmp_path / "run"), "--assets-dir", str(tmp_path / "assets"), "--device", "cpu"]
    real = ["--data.path", str(tmp_path / "my_x_rays"), "--model.path", str(tmp_path / "my_model")]
    end = started(monkeypatch, *run, *real, *flags)
    assert re.search(f"^train.py: the phantom's scorers know nothing of .*my_x_rays: .* {said}", end)
    assert not list(tmp_path.iterdir())
    assert "my_x_rays is no folder" in started(monkeypatch, *run, *real, "--stage", "0")  # which asks no scorer


@pytest.mark.parametrize("stage, name", [("2", "stage1"), ("1", "sft"), ("0", "base"), ("all", "eval")])
def test_a_stage_takes_no_name_that_means_something_else(stage, name, finished):
    with pytest.raises(ValueError, match=f"--name {name}: in a run this is the name of something else"):
        train.train(replace(finished, stage=stage, name=name))


def test_references_that_are_cut_are_counted_at_the_start(finished, cfg, capsys):
    train.train(replace(cfg, stage="0", sft=replace(cfg.sft, steps=1), rollout=replace(cfg.rollout, max_new_tokens=8)))
    first = load_studies(finished.data, "sft")[0].id
    said = f"12 of 12 references are cut: longer than rollout.max_new_tokens = 8 (first: study {first})"
    assert said in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_is_not_saved(cfg, monkeypatch):
    monkeypatch.setattr(parallel, "optimizer_step", lambda *_, **__: float("inf"))
    with pytest.raises(ValueError, match="sft: the gradient of update 1 is not finite: lower the learning rate"):
        train.train(replace(cfg, stage="0", save_every=1))
    assert not (Path(cfg.run) / "sft" / "checkpoint.pt").exists()


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_learning_rate_that_is_far_too_high_is_named(stage, finished, cfg):
    wild = replace(cfg.sft, lr=1e12), replace(cfg.grpo, lr=1e12)
    start = replace(cfg, stage="0") if stage == "0" else from_sft(finished, cfg)
    with pytest.raises(ValueError, match="not finite: lower the learning rate"):
        train.train(replace(start, sft=wild[0], grpo=wild[1]))


def test_two_runs_in_one_folder_are_refused(cfg):
    with lock(Path(cfg.run) / "sft" / ".lock", wait=False), pytest.raises(ValueError, match="another process"):
        train.train(replace(cfg, stage="0"))


@pytest.mark.parametrize("change", [dict(micro_batch=1), dict(micro_batch=2), dict(micro_batch=3, micro_group=2)])
def test_gradients_do_not_depend_on_the_micro_batch(finished, change, monkeypatch):
    def gradients(cfg):
        run, taken = Path(finished.run), {}
        model, processor, scorers, optimizer = train.load_stage(cfg, 1, run / "stage1/adapter", run / "sft/adapter")
        batch = load_studies(cfg.data, "train")[:3]

        def keep(optimizer, max_norm):
            taken.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return 0.0

        monkeypatch.setattr(parallel, "optimizer_step", keep)
        train.grpo_update(model, processor, scorers, optimizer, batch, cfg, k=2, stage=1)
        return taken

    whole = gradients(replace(finished, grpo=replace(finished.grpo, micro_batch=3, micro_group=0)))
    split = gradients(replace(finished, grpo=replace(finished.grpo, **change)))
    assert whole.keys() == split.keys() and any(g.abs().max() > 0 for g in whole.values())
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-6, rtol=1e-4)


def test_a_process_without_studies_takes_part(finished):
    """With fewer studies than processes its share is empty: no gradient of its own, no row of its own."""
    sft = Path(finished.run) / "sft" / "adapter"
    model, processor, scorers, optimizer = train.load_stage(finished, 1, sft, sft)
    stats, norm = train.policy_step(model, optimizer, [], sampling_rules(model, processor, finished), finished)
    assert (stats, norm) == ([], 0.0)
    assert average([{}, {"kl": [0.5], "loss": [1.0]}]) == {"kl": 0.5, "loss": 1.0}


def test_a_broken_reference_policy_is_named(finished):
    sft = Path(finished.run) / "sft" / "adapter"
    model, processor, scorers, optimizer = train.load_stage(finished, 1, sft, sft)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("lora_B.ref.weight")).fill_(float("nan"))
    batch = load_studies(finished.data, "train")[:2]
    with pytest.raises(ValueError, match="not finite: is the reference's adapter whole"):
        train.grpo_update(model, processor, scorers, optimizer, batch, finished, k=1, stage=1)


def test_dropout_is_off_where_there_is_a_reference_policy(finished):
    dropping = replace(finished, model=replace(finished.model, lora_dropout=0.5))
    sft = Path(finished.run) / "sft" / "adapter"
    for stage, off in ((0, False), (1, True)):
        model = train.load_stage(dropping, stage, None, sft if stage else None)[0]
        drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
        assert (not drops) == off


def test_inner_epochs_move_the_ratio_away_from_one(finished, tmp_path):
    cfg = replace(finished, run=str(tmp_path), grpo=replace(finished.grpo, num_iterations=3, lr=0.02))
    train.train(from_sft(finished, cfg))
    assert max(row["approx_kl"] for row in rows(tmp_path / "stage1")) > 0


def test_a_non_finite_loss_names_the_study(finished):
    adapter = Path(finished.run) / "sft" / "adapter"
    model, processor, _, optimizer = train.load_stage(finished, 1, adapter, adapter)
    batch = load_studies(finished.data, "train")[:2]
    with pytest.raises(ValueError, match="study b are not finite"):
        require_finite(torch.tensor([[0.0, 1.0]] * 3 + [[0.0, float("nan")]] * 3), ["a", "b"])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("lora_B.default.weight")).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sft_update(model, processor, optimizer, batch, finished, 0, 4)


def test_micro_batches_of_sft_add_up(finished):
    adapter = Path(finished.run) / "sft" / "adapter"
    batch, results = load_studies(finished.data, "train")[:5], []
    for size in (5, 2, 1):
        cfg = replace(finished, sft=replace(finished.sft, micro_batch=size))
        model, processor, _, optimizer = train.load_stage(cfg, 0, adapter, None)
        parameters = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in parameters]
        # by SGD the weights move by the gradient, at sft_update's own rate
        row = sft_update(model, processor, torch.optim.SGD(parameters), batch, cfg, 1, 4)
        moves = [(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)]
        results.append((row["loss"], torch.cat(moves)))
    (loss, move), *others = results
    for other_loss, other_move in others:
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert 0 < move.norm() and (other_move - move).norm() < 1e-5 * move.norm()


def test_sft_lowers_the_loss(finished, cfg):
    long = replace(cfg, stage="0", sft=replace(cfg.sft, steps=30, batch_size=12, lr=1e-2))
    train.train(long)
    losses = [row["loss"] for row in rows(Path(cfg.run) / "sft")]
    assert losses[-1] < losses[0] - 0.3


def test_keep_rows_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"k": 1}\n{"k": 2}\n{"k": 3}\n{"k": ')
    assert keep_rows(path, 0, 2) == 2
    assert path.read_text() == '{"k": 1}\n{"k": 2}\n'


def test_scorers_of_the_phantom_load(finished):
    scorers = load_scorers(finished)
    assert scorers.label(["Cardiomegaly."]).shape == (1, 14)
    study = load_studies(finished.data, "test")[0]
    from data import read_image

    assert scorers.similarity([read_image(study.image)], [study.id], [["clear lungs", "edema"]]).shape == (1, 2)
    assert get_base(load_policy(finished)[0]).config.model_type == "llava"
