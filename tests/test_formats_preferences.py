"""Preference pairs: the rows, those of MMedPO, what is wrong with a file, weights by hand."""

import json
import os
from pathlib import Path

import pytest
from conftest import make_images

from data import Study
from formats.preferences import Pair, load_pairs, normal_weights, read_pairs

SHARED = Path(os.environ.get("VALOR_SHARED", Path(__file__).parents[2] / "shared" / "data"))
PLAIN = {"id": "a", "chosen": "Clear.", "rejected": "Edema."}


def turns(report: str) -> list[dict]:
    return [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": report}]


MMEDPO = {"id": 7, "image": "7.jpg", "conversations": turns("Clear."), "rejected_conversations": turns(" Edema."),
          "weighted_score": 0.9}  # fmt: skip


def write(folder: Path, *rows, as_list: bool = False) -> Path:
    make_images(1)[0].save(folder / "noised.png")
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps(rows, indent=1) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_of_both_kinds_in_both_forms(tmp_path, as_list):
    visual = PLAIN | {"rejected": "Clear.", "weight": 1, "rejected_image": "noised.png"}
    path = write(tmp_path, PLAIN, visual, MMEDPO, MMEDPO | {"rejected_image": "noised.png"}, as_list=as_list)
    noised = tmp_path / "noised.png"
    assert read_pairs(path) == [
        Pair("a", "Clear.", "Edema."),
        Pair("a", "Clear.", "Clear.", 1, noised),
        Pair("7", "Clear.", "Edema.", 0.9),
        Pair("7", "Clear.", "Edema.", 0.9, noised),
    ]


@pytest.mark.parametrize("row, said", [
    ({"id": "a", "chosen": "x"}, "'rejected' holds no report"),
    (PLAIN | {"chosen": "  "}, "'chosen' holds no report"),
    (PLAIN | {"chosen": ["x"]}, "'chosen' holds no report"),
    (MMEDPO | {"rejected_conversations": []}, "'rejected_conversations' holds no report"),
    (MMEDPO | {"conversations": "Clear."}, "'conversations' holds no report"),
    ({"chosen": "x", "rejected": "y"}, "'id' is None, no study's id"),
    (PLAIN | {"id": ""}, "'id' is '', no study's id"),
    (PLAIN | {"weight": -0.1}, "'weight' is -0.1, no number from 0 on"),
    (PLAIN | {"weight": "1"}, "'weight' is 1, no number"),
    (PLAIN | {"weight": True}, "'weight' is True, no number"),
    (PLAIN | {"weight": float("nan")}, "'weight' is nan, no number"),
    (MMEDPO | {"weighted_score": float("inf")}, "'weighted_score' is inf, no number"),
    (PLAIN | {"rejected_image": "absent.png"}, "'rejected_image' .*absent.png: no image file"),
    (PLAIN | {"rejected_image": "pairs.jsonl"}, "'rejected_image' .*pairs.jsonl: unreadable image"),
    (PLAIN | {"rejected_image": "../noised.png"}, "'rejected_image': '../noised.png' leads out of"),
    (PLAIN | {"rejected_image": 3}, "'rejected_image' .*: no image file"),
])  # fmt: skip
@pytest.mark.parametrize("as_list", [False, True])
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, said, as_list):
    with pytest.raises(ValueError, match=f"pairs.jsonl: row 2: {said}") as error:
        read_pairs(write(tmp_path, PLAIN, row, as_list=as_list))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, said", [
    ("", "no rows"), ("[]", "no rows"), ("[1]", "row 1: not a JSON object"), ("[{}, ", "not JSON"),
    ('{"id": ', "line 1: not JSON"), ("3", "line 1: not a JSON object"), ("[" * 10**5, "not JSON"),
])  # fmt: skip
def test_a_file_that_holds_no_rows_is_one_line(tmp_path, text, said):
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"pairs.jsonl: {said}"):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="absent.jsonl: cannot be read"):
        read_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="dpo.pairs is empty: name a file"):
        read_pairs("")


def test_pairs_meet_their_studies_and_what_is_left_out_is_said(tmp_path, capsys):
    studies = [Study(name, [Path(f"{name}0.png"), Path(f"{name}1.png")], "x", "train") for name in "ab"]
    visual = PLAIN | {"rejected": "Clear.", "rejected_image": "noised.png"}
    path = write(tmp_path, visual, PLAIN | {"id": "c"}, PLAIN, PLAIN | {"rejected": "Clear."}, PLAIN | {"id": "d"})
    text, seen = load_pairs(str(path), studies, weighted=False)
    assert text == Pair("a", "Clear.", "Edema.", 1.0, None, studies[0].images)  # the text pairs first
    assert seen.rejected_image == tmp_path / "noised.png" and seen.weight == 1
    said = "5 pairs, left out 3: of no study of the split 2 (c, d), one report twice 1 (a)"
    assert capsys.readouterr().out == f"{path}: {said}\n"
    assert load_pairs(str(path), studies, False, "text") == [text]
    assert load_pairs(str(path), studies, False, "visual") == [seen]
    assert "not visual 1 (a), one report twice 1 (a)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the pair of study a has no 'weight': give one, or set dpo.weighted = false"):
        load_pairs(str(path), studies, weighted=True)
    with pytest.raises(ValueError, match="5 pairs, left out 5: .*: none is left; a study of the split is e"):
        load_pairs(str(path), [Study("e", [], "x", "train")], weighted=False)


def test_text_and_visual_weights_are_normalised_apart(tmp_path):
    studies = [Study(name, [Path("x.png")], "x", "train") for name in "ab"]
    seen = [PLAIN | {"id": name, "weight": 1, "rejected_image": "noised.png"} for name in "ab"]
    path = write(tmp_path, *seen, PLAIN | {"weight": 0}, PLAIN | {"id": "b", "weight": 0.9})
    assert [pair.weight for pair in load_pairs(str(path), studies, weighted=True)] == [0.75, 1.25, 1.0, 1.0]


def test_weights_by_hand():
    # mean 0.5, variance (0.25 + 0.01 + 0.01 + 0.25) / 8 = 0.065: 0.6 is 0.1 / 0.254951 = 0.392232 deviations above
    found = normal_weights([0, 0.4, 0.5, 0.5, 0.5, 0.5, 0.6, 1])
    assert found == pytest.approx([0.75, 0.875965, 1, 1, 1, 1, 1.124035, 1.25], abs=1e-6)
    assert normal_weights([0.3] * 3) == [1.0] * 3 and normal_weights([7]) == [1.0]  # 0.3 is no binary fraction


def test_mmedpos_pairs_of_iu_xray_load_as_they_are(capsys):
    path = SHARED / "preferences" / "mmedpo_iuxray_pairs.jsonl"
    if not path.is_file():
        pytest.skip(f"no preference pairs at {path}")
    pairs = read_pairs(path)
    assert len(pairs) == len({pair.id for pair in pairs}) == 2069
    assert all(pair.rejected_image is None and pair.chosen != pair.rejected for pair in pairs)
    studies = [Study(pair.id, [Path("x.png")], "x", "train") for pair in pairs[:2000]]
    loaded = load_pairs(str(path), studies, weighted=True)
    assert len(loaded) == 2000 and "left out 69: of no study of the split 69 (" in capsys.readouterr().out
    found = normal_weights([pair.weight for pair in pairs])
    assert [found.count(0.75), found.count(1.25)] == [125, 534]
    assert sum(found) / 2069 == pytest.approx(1.0401, abs=1e-4)  # after the clip
