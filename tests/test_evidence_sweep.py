"""The sweep over seeds: each arm is a command that parses, needs come first, the tables say what was seen."""

import sys

import numpy as np
import pytest

from config import Config, parse
from evidence import figures, sweep, sweep_tables
from evidence.tables import columns


@pytest.fixture
def cfg(tmp_path):
    return parse(sweep.SweepConfig, argv=["--root", str(tmp_path / "runs"), "--seeds", "0", "1"])


def test_every_arm_is_a_command_that_train_understands_and_differs_as_it_says(cfg):
    """The arms against VALOR: the same settings but for the fields that make the arm."""
    tasks = sweep.make_tasks(cfg, [])
    commands = {t.title: t.flags for t in tasks if t.script == "train.py"}
    assert len(commands) == 2 * len(sweep.ARMS)
    configs = {arm: parse(Config, argv=commands[f"seed 1: {arm}"]) for arm in sweep.ARMS}
    assert all(c.seed == 1 and c.run.endswith("runs/1") for c in configs.values())
    valor = configs["valor"]
    assert (valor.stage, valor.rewards.lambda_vis, valor.rewards.rank) == ("2", 0.5, "soft")
    assert configs["stage1_continued"].rewards.lambda_vis == 0 and configs["visual_only"].rewards.lambda_vis == 1
    assert configs["valor_literal"].rewards.rank == "literal"
    assert configs["projector_only"].stage2.trainable == "projector"
    assert configs["oracle_expert"].scorers.expert == "oracle"
    assert configs["noisy_expert"].scorers.expert == "phantom:expert_noisy"
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
    """Even where the others, the last one of its half among them, have results."""
    for arm in sweep.EVALUATED:
        folder = tmp_path / "runs" / "0" / "eval" / "test" / arm
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")

    def evaluations():
        return [task for task in sweep.make_tasks(cfg, []) if task.title == "seed 0: evaluation"]

    assert len(evaluations()) == 2 and all(task.made() for task in evaluations())
    arms = list(sweep.ARMS.items())
    monkeypatch.setattr(sweep, "ARMS", dict([*arms[:3], ("new", sweep.ARMS["valor"]), *arms[3:]]))
    monkeypatch.setattr(sweep, "EVALUATED", ["base", *sweep.ARMS])
    unfinished = [task for task in evaluations() if not task.made()]
    assert len(unfinished) == 1 and unfinished[0].flags[unfinished[0].flags.index("--policy") + 1] == "new"
    assert "seed 0: new" in [task.title for task in unfinished[0].after]


def test_arms_wait_for_their_predecessor_and_the_assets(cfg):
    tasks = {task.title: task for task in sweep.make_tasks(cfg, [])}
    assert {task.title for task in tasks["seed 1: valor"].after} >= {"seed 1: stage1", "assets: expert"}
    assert [task.title for task in tasks["seed 1: sft"].after] == ["assets: base"]
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
    later = {arm: arms[arm] for arm in list(sweep.ARMS)[1:]}
    even = {arm: estimate(0.5) for arm in sweep.ARMS}
    part = {"n": 3, "arms": even, "versus": even}
    about = {name: arm["what"] for name, arm in sweep.ARMS.items()}
    results = {"seeds": [0, 1], "split": "test", "studies": 384, "about": about,
               "bleu_by_reference": {"true": part, "false": part},
               "assets": {"expert": {"retrieval": 0.8}}, "arms": arms, "versus": {"sft": later}}  # fmt: skip
    text = sweep_tables.markdown(results)
    assert f"| valor |{4 * ' 30.0 [28.0, 32.0] |'} 21.7 [19.7, 23.7] |" in text
    assert "+21.7 [+19.7, +23.7]" in text
    assert all(text.count(f"| {arm} |") >= 4 for arm in sweep.EVALUATED)
    figures.draw_arms(results, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 10_000
