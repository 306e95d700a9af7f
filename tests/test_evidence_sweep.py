"""The sweep over seeds: each arm is a command that parses, needs come first, the tables say what was seen."""

import sys

import numpy as np
import pytest

from config import Config, parse
from evidence import compare, figures
from evidence import sweep as seeds
from evidence import sweep_tables as evidence
from evidence.metrics import METRICS


@pytest.fixture
def cfg(tmp_path):
    return parse(seeds.SeedsConfig, argv=["--root", str(tmp_path / "runs"), "--seeds", "0", "1"])


def task(tmp_path, name, needs=(), code=None):
    made, order = str(tmp_path / name), str(tmp_path / "order")
    code = code or f"open({made!r}, 'w').write('x'); open({order!r}, 'a').write({name!r})"
    script = tmp_path / f"{name}.py"
    script.write_text(code)
    after = [tmp_path / need for need in needs]
    return seeds.Task(name, [str(script)], tmp_path / name, after, 1.0, tmp_path / "log" / f"{name}.txt")


def test_every_arm_is_a_command_that_train_understands_and_differs_as_it_says(cfg):
    """The arms against VALOR: the same settings but for the fields that make the arm."""
    commands = {t.title: t.words for t in seeds.make_tasks(cfg, []) if t.words[0] == "train.py"}
    assert len(commands) == 2 * len(seeds.ARMS)
    configs = {arm: parse(Config, argv=commands[f"seed 1: {arm}"][1:]) for arm in seeds.ARMS}
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
    commands = {t.title: t.words for t in seeds.make_tasks(cfg, ["--rewards.lambda-vis", "0.4", "--seed", "3"])}
    arms = {arm: parse(Config, argv=commands[f"seed 1: {arm}"][1:]) for arm in ("stage1_continued", "valor")}
    assert arms["stage1_continued"].rewards.lambda_vis == 0 and arms["valor"].rewards.lambda_vis == 0.4
    assert all(c.seed == 1 for c in arms.values())


def test_tasks_run_after_what_they_need_and_once(tmp_path, capsys):
    tasks = [task(tmp_path, "c", "b"), task(tmp_path, "b", "a"), task(tmp_path, "a"), task(tmp_path, "d", "ac")]
    seeds.run_tasks(tasks)
    order = (tmp_path / "order").read_text()
    assert sorted(order) == list("abcd") and order.index("a") < order.index("b") < order.index("c") < order.index("d")
    assert capsys.readouterr().out.count("to go") == 4
    (tmp_path / "d").unlink()
    seeds.run_tasks(tasks)  # goes on: only what is missing is made
    assert (tmp_path / "order").read_text() == order + "d"


def test_a_failing_arm_stops_the_sweep_with_its_last_words(tmp_path):
    with pytest.raises(SystemExit, match="(?s)seeds: bad failed.*no luck"):
        seeds.run_tasks([task(tmp_path, "bad", code="raise SystemExit('no luck')"), task(tmp_path, "late", ["bad"])])
    with pytest.raises(SystemExit, match="waits for"):
        seeds.run_tasks([task(tmp_path, "orphan", ["nothing"])])


def test_own_flags_stay_and_others_are_passed_on(monkeypatch):
    seen = {}
    flags = ["--grpo.lr", "1e-5", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["seeds.py", "--seeds", "3", "4", *flags[:2], "--out=x", *flags[2:]])
    monkeypatch.setattr(seeds, "make_tasks", lambda cfg, flags: seen.update(cfg=cfg, flags=flags) or [])
    monkeypatch.setattr(seeds, "run_tasks", lambda tasks: sys.exit(0))
    with pytest.raises(SystemExit):
        seeds.main()
    assert seen["flags"] == flags and seen["cfg"].seeds == (3, 4)


def test_tables_and_figures_show_every_arm_and_seed(tmp_path):
    rng = np.random.default_rng(0)

    def estimate(value):
        each = {seed: value + rng.normal(0, 0.01) for seed in (0, 1)}
        return {"mean": value, "lo": value - 0.02, "hi": value + 0.02, "seeds": each}

    keys = [f"{row}/{metric}" for metric, row, _, _ in compare.COMPARED if metric in METRICS]
    arms = {arm: {key: estimate(0.3) for key in keys} for arm in ["fixed_template", *seeds.SHOWN]}
    arms["valor"]["greedy/hallucination_rate"] = estimate(0.217)
    later = {arm: arms[arm] for arm in list(seeds.ARMS)[1:]}
    even = {arm: estimate(0.5) for arm in seeds.ARMS}
    part = {"n": 3, "arms": even, "versus": even}
    results = {"seeds": [0, 1], "split": "test", "studies": 384, "about": {a: w for a, (_, _, w) in seeds.ARMS.items()},
               "bleu_by_reference": {"true": part, "false": part},
               "assets": {"expert": {"retrieval": 0.8}}, "arms": arms, "versus": {"sft": later}}  # fmt: skip
    text = evidence.markdown(results)
    assert "| valor | 30.0 [28.0, 32.0] | 30.0 [28.0, 32.0] | 21.7 [19.7, 23.7] |" in text
    assert "+21.7 [+19.7, +23.7]" in text
    assert all(text.count(f"| {arm} |") >= 4 for arm in seeds.SHOWN)
    figures.draw_arms(results, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 10_000
