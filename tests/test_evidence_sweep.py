"""The sweep over seeds: each arm is a command that parses, needs come first, the tables say what was seen."""

import itertools
import json
import pickle
import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config import Config, DataConfig, RewardConfig, parse
from evidence import figures, statistics, sweep, sweep_tables
from evidence.expert_accuracy import accuracy_file
from evidence.tables import columns

CLEAN = DataConfig(path="phantom:data_clean")
EVALUATED = ["base", *(name for name, arm in sweep.ARMS.items() if "script" not in arm)]


@pytest.fixture
def cfg(tmp_path):
    return parse(sweep.SweepConfig, argv=["--root", str(tmp_path / "runs"), "--seeds", "0", "1"])


def test_every_arm_is_a_command_that_train_understands_and_differs_as_it_says(cfg):
    """The arms against VALOR: the same settings but for the fields that make the arm."""
    tasks = sweep.make_tasks(cfg, [])
    commands = {t.title: t.flags for t in tasks if t.script == "train.py"}
    assert len(commands) == 2 * (len(EVALUATED) - 1)
    configs = {arm: parse(Config, argv=commands[f"seed 1: {arm}"]) for arm in EVALUATED[1:]}
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
    for arm, c in configs.items():  # as many updates and studies as both stages, as many candidates a study
        if c.stage == "dpo":
            more = 2 if arm == "mmedpo_all" else 1
            assert (c.dpo.batch_size, c.rollout.group_size) == (more * c.grpo.batch_size, valor.rollout.group_size)
    for task in tasks:
        if task.script == "evidence.pairs":
            assert task.flags[task.flags.index("--data.limit") + 1] == str(160 * valor.grpo.batch_size)
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
    for arm in EVALUATED:
        folder = tmp_path / "runs" / "0" / "eval" / "test" / arm
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")

    def evaluations():
        return [task for task in sweep.make_tasks(cfg, []) if task.script == "evaluate.py" and "seed 0" in task.title]

    assert len(evaluations()) == len(EVALUATED) and all(task.made() for task in evaluations())
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
        *(f"seed 0: {name} {what}" for what in ("judged", "spill")
          for name in ("base", "sft", "stage1", "clean_text", "dpo")),
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


def test_a_plan_brings_arms_of_its_own_and_seeds_models_of_their_own(tmp_path):
    """IU-Xray's: the data set's own small models, anew for the first seeds; no asset and no figure of the phantom."""
    root = Path(sweep.__file__).parents[1]
    plan, config = root / "evidence" / "plan_iu_xray.toml", root / "configs" / "iu_xray_tiny.toml"
    cfg = parse(sweep.SweepConfig, argv=["--config", str(config), "--plan", str(plan), "--own-models", "2",
                                         "--seeds", "3", "4", "5", "--root", str(tmp_path)])  # fmt: skip
    tasks = sweep.make_tasks(cfg, ["--config", str(config)])
    builds = [task.flags for task in tasks if task.script == "phantom.assets"]
    assert [(f[1], f[-1]) for f in builds] == [(f"tiny:{n}", s) for s in "340" for n in ("base", "labeller", "expert")]
    assert len({path for task in tasks for path in task.makes if "tiny-" in str(path)}) == 9
    configs = {t.title: parse(Config, argv=t.flags) for t in tasks if t.script == "train.py"}
    assert {title: c.assets_seed for title, c in configs.items() if "valor_literal" in title} == {
        "seed 3: valor_literal": 3, "seed 4: valor_literal": 4, "seed 5: valor_literal": 0}  # fmt: skip
    valor, other = configs["seed 3: valor"], configs["seed 3: other_image"]
    assert other == replace(valor, name="other_image", scorers=replace(valor.scorers, expert_sees="other"))
    assert configs["seed 3: oracle_expert"].scorers.expert == "oracle"
    dpo = configs["seed 3: dpo_mmedpo"].dpo
    assert dpo.steps == cfg.stage1.steps + cfg.stage2.steps and dpo.pairs.endswith("mmedpo_iuxray_pairs.jsonl")
    judged = [t.flags[1] for t in tasks if t.script == "evaluate.py" and "seed 3" in t.title]
    assert judged == ["base,nearest,retrieved", "sft", "stage1", "stage1_continued", "valor", "other_image",
                      "oracle_expert", "valor_literal", "dpo_mmedpo"]  # fmt: skip
    about = tomllib.loads(plan.read_text())
    arms, keys = about["arms"], {c.key for c in columns("pairs") + columns("gold")} | {"sampled/equal_hallucination"}
    for row in about["comparison"]:
        assert {*row["arms"]} <= arms.keys() and row["holds_if"].keys() <= keys | {"greedy/bleu_4"}, row
    wrong = 'comparison = []\n[margins]\n[arms.sft]\nafter = "b"\nflags = ""\n[arms.b]\nflags = ""\n'
    (tmp_path / "plan_x.toml").write_text(wrong)
    with pytest.raises(ValueError, match=r"plan_x.toml: \[sft\] must stand below \[b\]"):
        sweep.make_tasks(replace(cfg, plan=str(tmp_path / "plan_x.toml")), [])


def test_the_list_of_dpos_settings_trains_what_it_says(cfg):
    """And the sweep's arms take settings that stand in it."""
    plan = f"{Path(sweep.__file__).parent}/plan_dpo.toml"
    cfg = replace(cfg, plan=plan, seeds=(0,))
    listed, trained = sweep.chosen_arms(cfg), [t for t in sweep.make_tasks(cfg, []) if t.script == "train.py"]
    configs = {t.title.removeprefix("seed 0: "): parse(Config, argv=t.flags) for t in trained}
    tried = {name: of.dpo for name, of in configs.items() if name != "sft"}
    assert len(tried) == len(listed) - 3 == len({(d.pairs, d.weighted, d.lr, d.beta) for d in tried.values()})
    for name, dpo in tried.items():
        assert listed[name]["what"].endswith(f", lr {np.format_float_scientific(dpo.lr, exp_digits=1, trim='-')}, "
                                             f"beta {dpo.beta:g}") and dpo.steps == 160, name  # fmt: skip
        assert dpo.weighted == name.startswith("mmedpo") == dpo.pairs.endswith("pairs_mmedpo.jsonl")
    for name in ("dpo", "dpo_visual", "mmedpo", "mmedpo_text", "mmedpo_visual", "mmedpo_unweighted"):
        lr, beta = re.search(r"--dpo.lr (\S+) --dpo.beta (\S+)", sweep.ARMS[name]["flags"]).groups()
        assert (float(lr), float(beta)) in {(d.lr, d.beta) for of, d in tried.items() if of[:3] == name[:3]}


def test_own_flags_stay_and_others_are_passed_on(monkeypatch):
    seen = {}
    flags = ["--grpo.lr", "1e-5", "--threads", "1"]
    mine = ["--seeds", "3", "4"], ["--out=x", "--own_models", "1"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *mine[0], *flags[:2], *mine[1], *flags[2:]])
    monkeypatch.setattr(sweep, "make_tasks", lambda cfg, flags: seen.update(cfg=cfg, flags=flags) or [])
    monkeypatch.setattr(sweep, "run_tasks", lambda tasks: sys.exit(0))
    with pytest.raises(SystemExit):
        sweep.main()
    assert seen["flags"] == flags and (seen["cfg"].seeds, seen["cfg"].own_models) == ((3, 4), 1)


def made_up_sweep(root, assets, seeds=(3, 4, 5)):
    """Run folders of base, sft, stage1_continued and valor (its third seed missing) on 60 studies, and their truth."""
    rng, ids = np.random.default_rng(0), [f"s{i}" for i in range(60)]
    true = rng.integers(0, 4, 60)
    for seed in seeds:
        for arm, hits in {"base": 0.8, "sft": 0.5, "stage1_continued": 0.55, "valor": 0.75}.items():
            if (arm, seed) == ("valor", seeds[-1]):
                continue
            stats = {}
            for row, k in (("greedy", 1), ("sampled", 8)):
                correct, extra = rng.binomial(true * k, hits), rng.poisson(0.9 - hits / 2, 60)
                none = np.zeros(60)
                truth = [correct + extra, extra, true * k, true * k - correct, none, correct, none + 9, none]
                stats[row, "truth"] = np.stack(truth, axis=1)
            stats["greedy", "bleu"] = rng.integers(10, 40, (60, 10))
            stats["template", "bleu"] = np.full((60, 10), 5)
            stats["greedy", "rouge_l"] = np.stack([rng.random(60), np.ones(60)], axis=1)
            spill = rng.multinomial(4, [0.1, 0.2, 0.7], size=60)
            stats["sampled", "spill"] = np.column_stack([4 + 0 * true, spill, 4 + 0 * true, spill[:, ::2]])
            for split, row_names in (("test", ("greedy", "sampled", "template")), ("spill", ("sampled",))):
                folder = root / str(seed) / "eval" / split / arm
                folder.mkdir(parents=True)
                np.savez(folder / "stats.npz", **{
                    f"{row}/{family}": values.astype(float) for (row, family), values in stats.items()
                    if row in row_names and (family == "spill") == (split == "spill")})  # fmt: skip
                settings = {"seed": seed, "n": 60, "split": split, "eval": {"samples": 8}}
                (folder / "results.json").write_text(json.dumps({"settings": settings}))
                (folder / "reports.jsonl").write_text("".join(json.dumps({"id": i}) + "\n" for i in ids))
    (assets / "data").mkdir(parents=True)
    truth = [{"id": name, "labels": ["edema"], "stated": ["edema"] * (i % 2)} for i, name in enumerate(ids)]
    (assets / "data/truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truth))
    (assets / "expert").mkdir()
    (assets / "expert/quality.json").write_text('{"retrieval": 0.8}')


def by_hand(stats, a, b):
    """Sums of two columns of an array (n, k), one through the other."""
    return stats[:, a].sum() / stats[:, b].sum()


def test_every_number_is_recomputed_from_the_counts_alone(tmp_path, monkeypatch):
    """Three numbers by hand, from a file beside which nothing else is left; and the same page as of the first time."""
    made_up_sweep(tmp_path / "runs", tmp_path / "assets")
    about = {name: f"what {name} is" for name in ("sft", "stage1_continued", "valor")}
    for seed, value in ((3, 0.7), (4, 0.8)):
        file = accuracy_file(tmp_path / f"runs/{seed}", "phantom:expert")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"value": value}))
    given = [tmp_path / "assets"], {"valor": "phantom:expert"}
    sweep_tables.write_counts(tmp_path / "counts.npz", tmp_path / "runs", [3, 4, 5], "test", about, *given)
    with np.load(tmp_path / "counts.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    assert arrays["valor/greedy/truth"].shape == (2, 60, 8) and arrays["valor/greedy/truth"].dtype == np.uint8
    assert arrays["sft/greedy/rouge_l"].dtype == np.float16 and "sft/sampled/spill" in arrays
    read = sweep_tables.read_counts(tmp_path / "counts.npz")[0]["valor"][3]
    assert {values.dtype for values in read.values()} == {np.dtype(float)}  # halves would lose digits in their sums
    original = [np.load(tmp_path / f"runs/{s}/eval/test/valor/stats.npz") for s in (3, 4)]
    for name in ("runs", "assets"):
        shutil.rmtree(tmp_path / name)
    monkeypatch.setattr("sys.argv", ["sweep", "--recompute", f"{tmp_path}/counts.npz", "--out", f"{tmp_path}/again"])
    sweep.main()
    found = json.loads((tmp_path / "again/phantom.json").read_text())
    # 1: an arm's mean, 2: a paired difference of the seeds that both have, 3: another family
    hallucinated = [by_hand(stats["greedy/truth"], 1, 0) for stats in original]
    mean = found["arms"]["valor"]["greedy/hallucination_rate"]
    assert mean["mean"] == pytest.approx(np.mean(hallucinated)) and [*mean["seeds"]] == ["3", "4"]
    omitted = [by_hand(arrays["sft/greedy/truth"][i].astype(int), 3, 2) for i in (0, 1)]
    valor = [by_hand(stats["greedy/truth"], 3, 2) for stats in original]
    paired = found["versus"]["sft"]["valor"]["greedy/omission_rate"]
    assert paired["mean"] == pytest.approx(np.mean(valor) - np.mean(omitted))
    spilt = [(of[:, 2].sum() - of[:, 1].sum()) / of[:, 0].sum() for of in arrays["valor/sampled/spill"].astype(int)]
    assert found["arms"]["valor"]["sampled/prior_spill"]["mean"] == pytest.approx(np.mean(spilt))
    text = (tmp_path / "again/phantom.md").read_text()
    again = sweep_tables.collect_results(*sweep_tables.read_counts(tmp_path / "counts.npz"))
    assert text == sweep_tables.markdown(again, vars(RewardConfig()))
    assert "| BLEU-4* |" in text and "| CheXb. F1* |" in text and "| format %* |" in text and "| sampl. F1 |" in text
    assert f"{100 * np.mean(hallucinated):.1f} [" in text and "valor (2 seeds)" in text
    row = next(line for line in text.splitlines() if "truer than the same updates" in line)
    assert found["accuracy"] == {"valor": {"3": 0.7, "4": 0.8}} and "mean of the seeds: valor 0.750." in text
    assert "| valor - stage1_continued | 2 |" in row and ", p " in row and row.endswith("**not measured** |")
    assert text.count("**not run**") >= 10 and text.index("## Primary metrics") < text.index("## Secondary metrics")
    assert (tmp_path / "again/arms.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["", "_again", "_worlds", "_omissions", "_iu_xray"])
def test_the_published_counts_give_the_published_page(name):
    folder = Path(sweep.__file__).parents[1] / "results"
    if not (folder / f"counts{name}.npz").exists():
        pytest.skip(f"results/counts{name}.npz is not there: no such sweep has been published yet")
    runs, settings = sweep_tables.read_counts(folder / f"counts{name}.npz")
    text, line = (folder / f"{name[1:] or 'phantom'}.md").read_text(), "{:.1f} [{:.1f}, {:.1f}]".format
    for arm, key in (("valor", "sampled/sided_f1"), ("sft", "greedy/hallucination_rate"), ("base", "greedy/bleu_4")):
        found = statistics.estimate(runs[arm], key)
        cell = line(*(100 * found[name] for name in ("mean", "lo", "hi")))
        assert any(f"| {arm} " in row and cell in row for row in text.splitlines()), (arm, key, cell)
    assert (folder / f"counts{name}.npz").stat().st_size < 5e6 and len(settings["ids"]) == settings["studies"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", pickle.dumps({"settings": 1})])
def test_damaged_counts_are_one_line(tmp_path, content):
    (tmp_path / "counts.npz").write_bytes(content)
    with pytest.raises(ValueError, match="counts.npz: no file of counts") as stop:
        sweep_tables.read_counts(tmp_path / "counts.npz")
    assert "\n" not in str(stop.value)


def test_an_arm_without_any_result_is_named(tmp_path):
    made_up_sweep(tmp_path / "runs", tmp_path / "assets", seeds=(3, 4))
    given = tmp_path / "counts.npz", tmp_path / "runs"
    with pytest.raises(ValueError, match="valor has no result for any of the seeds 4"):
        sweep_tables.write_counts(*given, [4], "test", {"valor": ""}, [tmp_path / "assets"], {})
    with pytest.raises(ValueError, match="has no results on split 'test'"):
        sweep_tables.write_counts(*given, [3], "test", {"dpo": ""}, [tmp_path / "assets"], {})


def test_the_plan_names_arms_metrics_and_claims_that_there_are():
    assert set(statistics.MARGINS) == {column.key for column in columns("primary")}
    for plan in statistics.PLAN["comparison"]:
        assert set(plan["arms"]) <= set(EVALUATED) and plan["hypothesis"] and plan["row"], plan
        assert {column.key for column in columns("pairs")} >= plan["holds_if"].keys(), plan
        assert set(plan["holds_if"].values()) <= {"above 0", "below 0", "equal"}, plan


@pytest.mark.parametrize(
    ("lo", "hi", "p", "claim", "said"),
    [
        (0.01, 0.09, 0.01, "above 0", "holds"),
        (0.01, 0.09, 0.06, "above 0", "open"),  # not after Holm
        (-0.09, -0.01, 0.01, "above 0", "does not"),
        (-0.09, -0.01, 0.01, "below 0", "holds"),
        (-0.02, 0.02, 0.9, "below 0", "does not"),  # at most as large as the margin
        (-0.02, 0.04, 0.5, "above 0", "open"),
        (-0.02, 0.02, 0.9, "equal", "holds"),
        (0.01, 0.02, 0.01, "equal", "holds"),
        (0.04, 0.09, 0.01, "equal", "does not"),
        (-0.02, 0.04, 0.5, "equal", "open"),
        (0.01, 0.09, None, "above 0", "open"),  # one seed
    ],
)
def test_verdicts_by_hand(lo, hi, p, claim, said):
    assert statistics.verdict({"mean": (lo + hi) / 2, "lo": lo, "hi": hi}, claim, 0.03, p) == said


def test_a_comparison_holds_where_all_its_criteria_do(monkeypatch):
    """Sampled F1 (up, in each seed) and greedy length (down; not primary, so without Holm)."""
    def runs(f1, words):
        return {s: {"sampled/truth": np.array([[10, 0, 10, 0, 0, f1 + s % 2, 9, 0]] * 4, float),
                    "greedy/length": np.array([[words + s % 2, 1.0]] * 4)} for s in range(5)}  # fmt: skip

    claims = {"sampled/sided_f1": "above 0", "greedy/length": "below 0"}
    plan = [{"row": "x", "hypothesis": "h", "arms": [first, "b"], "holds_if": claims} for first in ("a", "c", "d")]
    monkeypatch.setitem(statistics.PLAN, "comparison", plan)
    a, b, c = runs(6, 20), runs(3, 30), runs(2, 20)
    a[0]["sampled/truth"][:, 5] += 1
    good, bad, absent = statistics.verdicts({"a": a, "b": b, "c": c})
    assert (good["verdict"], bad["verdict"], absent["verdict"]) == ("holds", "does not", "not run")
    assert good["seeds"] == 5 and good["p"] == {"sampled/sided_f1": good["found"]["sampled/sided_f1"]["p"]}
    for run in a.values():
        del run["greedy/length"]
    assert statistics.verdicts({"a": a, "b": b})[0]["verdict"] == "not measured"


def test_both_sweeps_stand_in_one_figure(tmp_path, monkeypatch):
    """Dots at the arms' means, in the order of the values; arms without results are left out, and so is a lone one."""
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    grid = {at: {key: {"mean": i / 10, "lo": i / 10 - 0.02, "hi": i / 10 + 0.03, "seeds": {0: i / 10 - 0.01}}
                 for key in figures.SWEPT}
            for i, at in enumerate((0, 0.1, 0.5))}  # fmt: skip
    lone = {"k_clin": {4: grid[0.5]}}
    figures.draw_sweeps({"studies": 384, "sweeps": {"lambda_vis": grid} | lone}, tmp_path / "sweeps.png")
    [figure] = drawn
    axes = figure.axes[: len(figures.SWEPT)]
    assert len(axes) == len(figures.SWEPT) == len([axis for axis in figure.axes if axis.has_data()])
    for axis in axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "0.1", "0.5"]
        spans = [list(line.get_ydata()) for line in axis.lines if line.get_linestyle() == "-"]
        assert spans == [pytest.approx([10 * i - 2, 10 * i + 3]) for i in range(3)]
        [dots] = [line for line in axis.lines if line.get_linestyle() == ":"]
        assert list(dots.get_ydata()) == pytest.approx([0, 10, 20])
    figures.draw_sweeps({"studies": 384, "sweeps": lone}, tmp_path / "none.png")
    assert (tmp_path / "sweeps.png").stat().st_size > 10_000 and not (tmp_path / "none.png").exists()


def test_all_arms_of_a_sweep_stand_on_the_same_seeds(monkeypatch):
    """VALOR has a third seed, of another level: beside arms of two seeds its first two count, alone all three."""
    assert {arm for grid in sweep_tables.SWEEPS.values() for arm in grid.values()} <= set(sweep.ARMS)
    level = {0: 3, 1: 5, 2: 40}
    runs = {arm: {seed: {"greedy/length": np.full((4, 2), (level[seed] + more, 1.0))} for seed in range(seeds)}
            for arm, seeds, more in (("base", 3, 0), ("fixed_template", 3, 0), ("sft", 3, 0), ("valor", 3, 0),
                                     ("stage1_continued", 2, 1), ("visual_only", 2, 2))}  # fmt: skip
    known = ("split", "studies", "torch", "protocol", "assets")
    settings = dict.fromkeys(known) | {"about": {arm: arm for arm in runs if arm not in ("base", "fixed_template")},
                                       "kinds": {}, "accuracy": {}, "seeds": {"base": [0, 1, 2]}}  # fmt: skip
    found = sweep_tables.collect_results(runs, settings, {"comparison": [], "margins": {}})
    means = {at: of["greedy/length"]["mean"] for at, of in found["sweeps"]["lambda_vis"].items()}
    assert means == {0: 5, 0.5: 4, 1: 6} and found["arms"]["valor"]["greedy/length"]["mean"] == 16
    assert {*found["sweeps"]["k_clin"]} == {4} and found["sweeps"]["k_clin"][4]["greedy/length"]["mean"] == 16


def made_up(arms, seeds=(0, 1)):
    """Results of `arms` {arm: value} in each primary metric, and the same as differences to Stage 1 continued."""
    found = {arm: {key: {"mean": value, "lo": value - 0.1, "hi": value + 0.1, "seeds": dict.fromkeys(seeds, value)}
                   for key in figures.PRIMARY} for arm, value in arms.items()}  # fmt: skip
    return {"studies": 384, "arms": found, "versus": {"stage1_continued": found}, "accuracy": {}, "trends": []}


def drawn_by(monkeypatch, draw, *given):
    figures_made = []
    monkeypatch.setattr(figures.plt, "close", figures_made.append)
    draw(*given)
    return figures_made[0]


def test_references_and_experts_are_crossed(tmp_path, monkeypatch):
    """A dot for each arm that has run, over its expert; clean references are the second line."""
    assert {arm for line in figures.CROSSED.values() for arm in line.values()} <= set(sweep.ARMS)
    arms = {"stage1_continued": 0.1, "noisy_expert": 0.2, "valor": 0.3, "clean_text": 0.4, "clean_both": 0.5}
    figure = drawn_by(monkeypatch, figures.draw_crossed, made_up(arms), tmp_path / "crossed.png")
    for axis in figure.axes:
        noisy, clean = [line for line in axis.lines if line.get_marker() in ("o", "s")]
        assert list(noisy.get_ydata()) == pytest.approx([10, 20, 30]) and list(noisy.get_xdata()) == [0, 1, 2]
        assert list(clean.get_ydata()) == pytest.approx([40, 50]) and list(clean.get_xdata()) == [0.08, 2.08]


def test_the_phase_diagram_puts_gains_over_measured_accuracy(tmp_path, monkeypatch):
    results = made_up({"valor": 0.06, "expert_200": 0.01, "score_noise": 0.03, "visual_only": 0.02})
    measured = {"valor": {0: 0.78, 1: 0.8}, "expert_200": {0: 0.7}, "score_noise": {0: 0.7}, "expert_50": {}}
    results["accuracy"] = measured | {"visual_only": {0: 0.7}}  # of valor's expert: no dot of its own
    results["trends"] = [{"row": "a", "places": {"valor": 0.79, "expert_200": 0.7}, "line": [0.5, -0.34],
                          "zero": (0.66, 0.7)}]  # fmt: skip
    [axis] = drawn_by(monkeypatch, figures.draw_phase, results, tmp_path / "phase.png").axes
    dots = {line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines}
    assert dots["s"] == pytest.approx((0.7, 3)) and {text.get_text() for text in axis.texts} == {
        "valor", "expert 200", "score noise"}  # fmt: skip
    [line] = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert list(line.get_ydata()) == pytest.approx([1, 5.5]) and len(axis.patches) == 1


def test_the_worlds_stand_below_one_another(tmp_path, monkeypatch):
    worlds = {"world 0": made_up({"valor": 0.05}), "omissions": made_up({"valor": -0.02})}
    figure = drawn_by(monkeypatch, figures.draw_worlds, worlds, tmp_path / "worlds.png")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*worlds]
    for axis in figure.axes:
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [line.get_xdata()[0] for line in dots] == pytest.approx([5, -2])
        assert dots[0].get_ydata()[0] > dots[1].get_ydata()[0]


@pytest.mark.parametrize(("arm", "expert"), [("valor", "phantom:expert"), ("vis_05", "phantom:expert"), ("dpo", None),
                                             ("noisy_expert", "phantom:expert_noisy"), ("stage1_continued", None),
                                             ("oracle_expert", None), ("stage1", None)])  # fmt: skip
def test_whose_accuracy_is_measured(arm, expert):
    assert sweep.expert_of(sweep.ARMS[arm]) == expert
    noisy = {"flags": "--stage 2 --scorers.expert-noise 0.05"}
    assert sweep.expert_of(noisy) == "phantom:expert+0.05"


def test_an_expert_of_ones_own_and_arms_without_stage_1_need_no_other_task(cfg, monkeypatch):
    """Nothing is built for an expert that lies somewhere, and without Stage 1 there are no groups to measure on."""
    mine = {"after": "stage1", "flags": "--stage 2 --scorers.expert /models/mine", "what": "mine"}
    monkeypatch.setitem(sweep.ARMS, "mine", mine)
    titles = {task.title: task for task in sweep.make_tasks(replace(cfg, arms=("mine",)), [])}
    measured = titles["seed 0: experts"]
    assert measured.flags[-2:] == ["--experts", "/models/mine"]
    assert [task.title for task in measured.after] == ["seed 0: stage1"]
    assert "seed 0: experts" not in {task.title for task in sweep.make_tasks(replace(cfg, arms=("valor_dense",)), [])}


@pytest.mark.parametrize("name", ["worlds", "omissions"])
def test_a_plan_without_arms_runs_those_that_it_compares(cfg, name):
    plan = f"{Path(sweep.__file__).parent}/plan_{name}.toml"
    cfg = replace(cfg, plan=plan, seeds=(3, 4), own_models=1)
    assert [*sweep.chosen_arms(cfg)] == ["sft", "stage1", "stage1_continued", "valor"]
    titles = [task.title for task in sweep.make_tasks(cfg, [])]
    assert titles.count("assets: expert") == 2 and "seed 3: experts" in titles
    assert statistics.read_plan(plan)["margins"] == statistics.MARGINS


def test_no_curves_of_a_sweep_that_left_an_arm_out(tmp_path):
    for arm in ("sft", "stage1", "stage1_continued"):
        (tmp_path / "0" / arm).mkdir(parents=True)
        (tmp_path / "0" / arm / "metrics.jsonl").write_text('{"k": 1}\n')
    figures.draw_curves([tmp_path / "0"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_the_curves_mark_where_clinical_rewards_and_stage_2_begin(tmp_path, monkeypatch):
    drawn, rng = [], np.random.default_rng(0)
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    updates = {"sft": range(1, 4), "stage1": range(1, 13)} | dict.fromkeys(("stage1_continued", "valor"), range(13, 25))
    for seed, (stage, ks) in itertools.product("01", updates.items()):
        rows = []
        for k in ks:
            row = {"k": k, "reward/total": rng.random(), "reward/bleu4": rng.random(), "kl": rng.random()}
            row |= {"reward/chexbert": rng.random()} if k % 4 == 0 else {}
            row |= {"val/hallucination_rate": 0.3, "val/bleu_4": 0.2} if k % 3 == 0 else {}
            rows.append(json.dumps(row) + "\n")
        (tmp_path / seed / stage).mkdir(parents=True)
        (tmp_path / seed / stage / "metrics.jsonl").write_text("".join(rows))
    figures.draw_curves([tmp_path / "0", tmp_path / "1"], tmp_path / "curves.png")
    for axis in drawn[0].axes:
        marks = {line.get_linestyle(): line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1}
        assert marks == {":": 12.5, "--": 4}
    assert "0 = SFT" in drawn[0].get_suptitle() and drawn[0].axes[3].lines[0].get_xdata()[0] == 0
    assert {"BLEU-4", "CheXbert F1"} == {text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()}
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    log = tmp_path / "1/sft/metrics.jsonl"  # of a run whose SFT policy was not validated
    log.write_text(log.read_text().replace("val/", "x/"))
    figures.draw_curves([tmp_path / "0", tmp_path / "1"], tmp_path / "curves.png")
    assert "0 = SFT" not in drawn[1].get_suptitle() and drawn[1].axes[3].lines[0].get_xdata()[0] == 3


@pytest.mark.parametrize("text, said", [(None, "cannot be read"), ("[", "not TOML"), ("", "no table 'margins'"),
                                        ("[margins]\n", "no table 'comparison'")])  # fmt: skip
def test_what_is_no_plan_is_one_line(tmp_path, text, said, monkeypatch):
    if text is not None:
        (tmp_path / "plan_x.toml").write_text(text)
    monkeypatch.setattr("sys.argv", ["sweep", "--plan", f"{tmp_path}/plan_x.toml", "--out", f"{tmp_path}/out"])
    with pytest.raises(SystemExit, match=f"sweep: .*plan_x.toml.*{said}") as stop:
        sweep.main()
    assert "\n" not in str(stop.value)
