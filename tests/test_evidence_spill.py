"""Prior spill: films that differ in one finding alone, and policies of which the effects are known."""

import json

import numpy as np
import pytest

from evidence import compare, metrics, spill
from phantom.config import PhantomConfig
from phantom.image import render
from phantom.world import PRIORS, counterfactuals, sample_findings

WORLD = PhantomConfig()


@pytest.fixture(scope="module")
def studies():
    return [counterfactuals(WORLD, 0, index) for index in range(2 * len(PRIORS))]


def shown(study):
    """What each of a study's three films shows."""
    cause, guess, labels, _ = study
    return [set(labels), set(labels) - {guess}, set(labels) - {cause, guess}]


def write(labels):
    names = [label.partition("_") for label in sorted(labels)]
    return "<report>FINDINGS: " + " ".join(f"There is {side} {name}." for name, _, side in names) + "</report>"


def effects(studies, outputs):
    found = metrics.summarise({"spill": {"spill": spill.tally(studies, outputs)}}, (), 50, 0)["spill"]
    return [found[name]["value"] for name in ("prior_spill", "own_effect", "own_effect_prior")]


def test_the_priors_take_turns_and_the_films_differ_in_a_finding_alone(studies):
    assert [(cause, guess) for cause, guess, *_ in studies] == 2 * [(cause, guess) for _, cause, guess in PRIORS]
    for cause, guess, labels, (both, alone, neither) in studies:
        assert {cause, guess} <= set(labels)
        for one, other in ((both, alone), (alone, neither)):
            changed = one != other
            assert 0.002 < changed.mean() < 0.5, (cause, guess)  # and the others to the last bit, noise and all
    same = counterfactuals(WORLD, 0, 3)
    assert all((a == b).all() for a, b in zip(same[3], studies[3][3], strict=True))
    assert (counterfactuals(WORLD, 1, 3)[3][0] != same[3][0]).any()


def test_a_finding_left_out_leaves_the_random_numbers_of_the_others():
    rng = np.random.default_rng(0)
    findings = next(f for f in iter(lambda: sample_findings(rng, WORLD), None) if len(f) > 2)
    whole, masks = render(findings, np.random.default_rng(1), 64)
    label = findings[-1].label
    without, left = render(findings, np.random.default_rng(1), 64, (label,))
    shorter, _ = render(findings[:-1], np.random.default_rng(1), 64)
    assert masks.keys() - left.keys() == {label} and (whole != without).mean() < 0.5 < (whole != shorter).mean()
    assert (whole != without)[masks[label]].mean() > 0.5


def test_a_world_without_such_a_study_is_refused():
    with pytest.raises(ValueError, match="no study has both cardiomegaly and edema: change their rates"):
        counterfactuals(PhantomConfig(edema=0.0, edema_with_cardiomegaly=0.0), 0, 0)


def test_who_looks_has_no_spill_and_whole_effects(studies):
    outputs = [[[write(labels)] * 3 for labels in shown(study)] for study in studies]
    assert effects(studies, outputs) == [0, 1, 1]


def test_who_writes_by_prior_spills_at_its_rate(studies):
    """The guess stands in three of four reports where its cause is on the film, and nowhere else."""
    outputs = []
    for cause, guess, labels, _ in studies:
        films = []
        for true in shown((cause, guess, labels, None)):
            rest = true - {guess}
            films.append([write(rest | {guess} if cause in true else rest)] * 3 + [write(rest)])
        outputs.append(films)
    assert effects(studies, outputs) == [0.75, 1, 0]


def test_who_always_says_the_same_has_no_effects(studies):
    outputs = [[[write({"edema", "effusion_left"}), write([])]] * 3 for _ in studies]
    assert effects(studies, outputs) == [0, 0, 0]


def test_counts_by_hand():
    """Edema suggests the cardiomegaly of the second study, so that it says nothing of own_effect. The third one's guess
    would suggest its cause, but is on neither of the two films that count."""
    studies = [
        ("fracture_left", "pneumothorax_left", ["edema", "pneumothorax_left", "fracture_left"], []),
        ("cardiomegaly", "effusion_left", ["cardiomegaly", "edema", "effusion_left"], []),
        ("effusion_left", "atelectasis_left", ["effusion_left", "atelectasis_left"], []),
    ]
    a, b, none = "Left pneumothorax. Left fracture.", "Left rib fracture. Pneumothorax.", "Clear lungs."
    outputs = [[[a, b], [a, none], [none, none]], [["Large heart."] * 2, ["Left effusion.", none], ["Effusion.", none]]]
    outputs.append([["Left effusion."] * 2, ["Left effusion."] * 2, [none] * 2])
    rows = [[2, 0, 1, 2, 2, 0, 1], [2, 1, 1, 0, 0, 0, 0], [2, 0, 0, 0, 2, 0, 2]]
    assert spill.tally(studies, outputs).tolist() == rows
    assert effects(studies, outputs) == pytest.approx([(2 - 1) / 6, (1 + 2) / 4, (2 - 2) / 6])


def test_the_command_writes_what_compare_shows(studies, tmp_path, monkeypatch, capsys):
    looks = {"looks": True, "guesses": False}
    monkeypatch.setattr(spill, "find_policies", lambda run, chosen: dict.fromkeys(looks))
    monkeypatch.setattr(spill, "resolve", lambda cfg, needs: cfg)
    now, asked = iter(looks), []
    monkeypatch.setattr(spill, "load_policy", lambda cfg, adapter: (next(now), None))

    def reports(model, processor, views, cfg, ids, samples):
        asked.append((ids, [view.mode for [view] in views]))
        texts = []
        for number, name in enumerate(ids, sum(len(ids) for ids, _ in asked[:-1])):
            study = studies[int(name.removeprefix("spill"))]
            true = shown(study)[number % 3]
            texts.append([write(true if looks[model] or study[0] not in true else true | {study[1]})] * samples)
        return texts

    monkeypatch.setattr("evidence.generate.generate_reports", reports)
    for seed in "01":
        now, asked[:] = iter(looks), []
        flags = ["spill", "--run", str(tmp_path / seed), "--seed", seed, "--pairs", "16", "--eval.batch-size", "6"]
        monkeypatch.setattr("sys.argv", flags)
        spill.main()
        for name in looks:
            folder = tmp_path / seed / "eval/test" / name
            folder.mkdir(parents=True)
            np.savez(folder / "stats.npz", **{"greedy/length": np.ones((2, 2))})
            (folder / "reports.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
            settings = {"seed": int(seed), "n": 2, "split": "test", "eval": {}}
            (folder / "results.json").write_text(json.dumps({"settings": settings}))
    assert "looks: prior spill 0.0 [0.0, 0.0], own effect 100.0" in capsys.readouterr().out
    assert asked[0][0] == ["spill0"] * 3 + ["spill1"] * 3 and asked[0][1] == ["RGB"] * 6
    table = compare.compare((f"{tmp_path}/*/looks", f"{tmp_path}/*/guesses"), "test")
    rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()}
    assert rows["prior spill"][:3] == ["+100.0", "[+100.0,", "+100.0]"] and rows["prior spill"][4] == "0.000"
    path = tmp_path / "1/eval/spill/guesses/results.json"
    path.write_text(path.read_text().replace('"n": 16,\n    "seed"', '"n": 17,\n    "seed"'))
    with pytest.raises(ValueError, match="stats.npz|another 'spill'"):
        compare.compare((f"{tmp_path}/*/looks", f"{tmp_path}/*/guesses"), "test")
