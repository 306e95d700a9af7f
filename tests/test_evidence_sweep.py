"""The sweep over seeds: each arm is a command that parses, needs come first, the tables say what was seen."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from config import Config, DataConfig, parse
from evidence import figures, sweep, sweep_tables
from evidence.tables import columns

CLEAN = DataConfig(path="phantom:data_clean")


@pytest.fixture
def cfg(tmp_path):
    return parse(sweep.SweepConfig, argv=["--root", str(tmp_path / "runs"), "--seeds", "0", "1"])


def test_every_arm_is_a_command_that_train_understands_and_differs_as_it_says(cfg):
    """The arms against VALOR: the same settings but for the fields that make the arm."""
    tasks = sweep.make_tasks(cfg, [])
    commands = {t.title: t.flags for t in tasks if t.script == "train.py"}
    assert len(commands) == 2 * (len(sweep.EVALUATED) - 1)
    configs = {arm: parse(Config, argv=commands[f"seed 1: {arm}"]) for arm in sweep.EVALUATED[1:]}
    assert all(c.seed == 1 and c.run.endswith("runs/1") for c in configs.values())
    valor = configs["valor"]
    assert (valor.stage, valor.rewards.lambda_vis, valor.rewards.rank) == ("2", 0.5, "soft")
    assert configs["stage1_continued"].rewards.lambda_vis == 0 and configs["visual_only"].rewards.lambda_vis == 1
    assert configs["valor_literal"].rewards.rank == "literal"
    assert configs["projector_only"].stage2.trainable == "projector"
    assert configs["oracle_expert"].scorers.expert == "oracle"
    assert configs["noisy_expert"].scorers.expert == "phantom:expert_noisy"
    assert configs["clean_text"] == replace(configs["stage1_continued"], name="clean_text", data=CLEAN, val_every=0)
    assert configs["vis_05"].rewards.lambda_vis == 0.05 and configs["valor_dense"].rewards.k_clin == 1
    assert configs["valor_rare"].init_from.endswith("runs/1/stage1_rare")
    assert configs["mmedpo"].dpo.weighted and not configs["mmedpo_unweighted"].dpo.weighted
    assert {c.dpo.steps for c in configs.values() if c.stage == "dpo"} == {160}
    for arm, c in configs.items():
        if c.stage == "2":  # fair: as many updates, the same learning rate, batch and group
            assert (c.stage2.steps, c.grpo, c.rollout) == (valor.stage2.steps, valor.grpo, valor.rollout), arm
    plain = configs["plain_grpo"]
    assert plain.grpo.advantage == "zscore" and plain.rewards.k_clin == 0 and plain.rewards.lambda_sem == 0
    assert plain.stage1.steps == valor.stage1.steps + valor.stage2.steps


def test_the_users_flags_do_not_change_what_an_arm_is(cfg):
    commands = {t.title: t.flags for t in sweep.make_tasks(cfg, ["--rewards.lambda-vis", "0.4", "--seed", "3"])}
    arms = {arm: parse(Config, argv=commands[f"seed 1: {arm}"]) for arm in ("stage1_continued", "valor")}
    assert arms["stage1_continued"].rewards.lambda_vis == 0 and arms["valor"].rewards.lambda_vis == 0.4
    assert all(c.seed == 1 for c in arms.values())


def test_an_arm_added_later_is_evaluated_too(cfg, tmp_path, monkeypatch):
    """Even where all the others have results."""
    for arm in sweep.EVALUATED:
        folder = tmp_path / "runs" / "0" / "eval" / "test" / arm
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")

    def evaluations():
        return [task for task in sweep.make_tasks(cfg, []) if task.script == "evaluate.py" and "seed 0" in task.title]

    assert len(evaluations()) == len(sweep.EVALUATED) and all(task.made() for task in evaluations())
    monkeypatch.setitem(sweep.ARMS, "new", sweep.ARMS["valor"])
    [unfinished] = [task for task in evaluations() if not task.made()]
    assert unfinished.flags[unfinished.flags.index("--policy") + 1] == "new"
    assert [task.title for task in unfinished.after] == ["seed 0: new"]


def test_some_arms_bring_those_they_start_from_and_no_other_asset(cfg):
    cfg.arms = ("clean_text", "dpo")
    titles = [task.title for task in sweep.make_tasks(cfg, [])]
    assert [title[8:] for title in titles[:5]] == ["data", "base", "labeller", "expert", "data_clean"]
    assert [title for title in titles if title.startswith("seed 0")] == [
        "seed 0: sft", "seed 0: stage1", "seed 0: clean_text", "seed 0: pairs", "seed 0: dpo",
        *(f"seed 0: {name} judged" for name in ("base", "sft", "stage1", "clean_text", "dpo")),
        "seed 0: baselines"]  # fmt: skip
    cfg.arms = ("best",)
    with pytest.raises(ValueError, match="--arms best: arms.toml has sft, stage1"):
        sweep.make_tasks(cfg, [])


def test_an_arm_of_three_seeds_has_the_first_three(cfg):
    cfg.seeds, cfg.arms = (4, 9, 2, 7), ("vis_05", "valor")
    titles = [task.title for task in sweep.make_tasks(cfg, [])]
    assert [seed for seed in cfg.seeds if f"seed {seed}: vis_05" in titles] == [4, 9, 2]
    assert [seed for seed in cfg.seeds if f"seed {seed}: valor judged" in titles] == [4, 9, 2, 7]


def test_an_arm_stands_below_the_one_it_starts_from(cfg, monkeypatch):
    monkeypatch.setitem(sweep.ARMS, "sft", {"flags": "--stage 0", "after": "valor", "what": ""})
    with pytest.raises(ValueError, match=r"\[sft\] must stand below \[valor\]"):
        sweep.make_tasks(cfg, [])


def test_arms_wait_for_their_predecessor_and_the_assets(cfg):
    tasks = {task.title: task for task in sweep.make_tasks(cfg, [])}
    assert {task.title for task in tasks["seed 1: valor"].after} >= {"seed 1: stage1", "assets: expert"}
    assert [task.title for task in tasks["seed 1: sft"].after] == ["assets: base"]
    assert {task.title for task in tasks["seed 1: dpo"].after} >= {"seed 1: pairs"}
    assert [task.title for task in tasks["assets: base"].after] == ["assets: data"]


def test_own_flags_stay_and_others_are_passed_on(monkeypatch):
    seen = {}
    flags = ["--grpo.lr", "1e-5", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--seeds", "3", "4", *flags[:2], "--out=x", *flags[2:]])
    monkeypatch.setattr(sweep, "make_tasks", lambda cfg, flags: seen.update(cfg=cfg, flags=flags) or [])
    monkeypatch.setattr(sweep, "run_tasks", lambda tasks: sys.exit(0))
    with pytest.raises(SystemExit):
        sweep.main()
    assert seen["flags"] == flags and seen["cfg"].seeds == (3, 4)


def test_tables_and_figures_show_every_arm_and_seed(tmp_path):
    rng = np.random.default_rng(0)

    def estimate(value):
        each = {seed: value + rng.normal(0, 0.01) for seed in (0, 1)}
        return {"mean": value, "lo": value - 0.02, "hi": value + 0.02, "seeds": each}

    keys = [column.key for column in columns("pairs")]
    arms = {arm: {key: estimate(0.3) for key in keys} for arm in ["fixed_template", *sweep.EVALUATED]}
    arms["valor"]["greedy/hallucination_rate"] = estimate(0.217)
    later = {arm: arms[arm] for arm in sweep.EVALUATED[2:]}
    even = {arm: estimate(0.5) for arm in sweep.EVALUATED[1:]}
    part = {"n": 3, "arms": even, "versus": even}
    about = {name: sweep.ARMS[name]["what"] for name in sweep.EVALUATED[1:]}
    results = {"seeds": [0, 1], "split": "test", "studies": 384, "about": about,
               "bleu_by_reference": {"true": part, "false": part},
               "assets": {"expert": {"retrieval": 0.8}}, "arms": arms, "versus": {"sft": later}}  # fmt: skip
    text = sweep_tables.markdown(results)
    assert f"| valor |{4 * ' 30.0 [28.0, 32.0] |'} 21.7 [19.7, 23.7] |" in text
    assert "+21.7 [+19.7, +23.7]" in text
    assert all(text.count(f"| {arm} |") >= 4 for arm in sweep.EVALUATED)
    figures.draw_arms(results, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 10_000
