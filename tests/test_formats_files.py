"""files.py: exact labels, and what text, JSON and CSV files may be like."""

import gzip
import os
import re
from pathlib import Path

import pytest

from formats.files import exact_labels, frontal_first, inside, read_csv, read_json, read_jsonl, read_text


@pytest.mark.parametrize("labels", [[], ["cardiomegaly"], ["effusion_left", "lesion_right"]])
def test_the_phantoms_labels_are_exact(labels):
    assert exact_labels(labels, "truth.jsonl: row 3") == labels
    assert exact_labels(None, "truth.jsonl: row 3") is None


@pytest.mark.parametrize(
    "labels",
    [
        ["Cardiomegaly"],  # CheXpert's names
        ["No Finding", "effusion_left"],
        ["effusion_left", "Pleural Effusion"],
        ["effusion"],  # no side
        [1.0, 0.0, -1.0, *[None] * 11],  # CheXpert's 14 classes
        "cardiomegaly",  # eleven letters
        "",
        {"cardiomegaly": 1},
        [["cardiomegaly"]],
        [{"label": "cardiomegaly"}],
        float("nan"),
        0,
        True,
    ],
)
def test_other_labels_are_refused_in_one_line_that_names_the_row(labels):
    with pytest.raises(ValueError, match=r"^truth.jsonl: row 3: labels .*the phantom's, such as 'fract") as error:
        exact_labels(labels, "truth.jsonl: row 3")
    assert "\n" not in str(error.value) and len(str(error.value)) < 240


# ------------------------------------------------------------------------------------------------------------ files


def message(read, path) -> str:
    with pytest.raises(ValueError) as error:
        list(read(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "dangling").symlink_to("nowhere")
    cases = {"pipe": "not a regular file", ".": "not a regular file", "circle": "symbolic links", "dangling": "No such",
             "a" * 300: "File name too long", "pipe/x": "Not a directory"}  # fmt: skip
    for name, words in cases.items():
        for read in (read_text, read_json, read_jsonl, lambda path: read_csv(path, ())):
            assert words in message(read, tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_line(tmp_path):
    (tmp_path / "annotation.json").write_text("{}")
    (tmp_path / "annotation.json").chmod(0)
    assert "Permission denied" in message(read_json, tmp_path / "annotation.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a":' * 100_000, '{"a": ' + 5000 * "1" + "}", "null", "[]", "7", '"a"', "NaN", "{}{}"],
    ids=lambda text: text[:12],
)
def test_damaged_json_is_one_line_with_its_place(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert re.search("json.*: not (JSON|a JSON object)", message(read_json, path))
    path.write_text("{}\n\n" + (text or "{"))
    assert re.search("rows.jsonl: line 3: not (JSON|a JSON object)", message(read_jsonl, path))


def test_text_in_any_unicode_encoding(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        (tmp_path / "a.json").write_bytes('{"id": "caf\u00e9"}\r\n'.encode(encoding))
        assert read_json(tmp_path / "a.json") == read_jsonl(tmp_path / "a.json")[0] == {"id": "caf\u00e9"}
        for name, opener in (("a.csv", open), ("b.csv.gz", gzip.open)):
            with opener(tmp_path / name, "wb") as file:
                file.write('id,text\r\ncaf\u00e9,"a,\r\nb"\r\n'.encode(encoding))
            assert [row["id"] for row in read_csv(tmp_path / name, ("id", "text"))] == ["caf\u00e9"]
    for bad in (b'{"a": "\xff"}', b"\xff\xfea", '{"a": "\u00e9"}'.encode("latin-1")):
        (tmp_path / "a.json").write_bytes(bad)
        assert "cannot be read" in message(read_json, tmp_path / "a.json")


def test_only_half_characters_are_replaced(tmp_path):
    path, whole = tmp_path / "a.json", "\U0001f600"
    for written, read in {r"\ud800": "?", r"x\uDC00": "x?", r"\ud83d\ude00": whole, r"\\ud800": r"\ud800"}.items():
        path.write_text(f'{{"a": ["{written}"], "{written}": 1}}')
        assert read_json(path) == {"a": [read], read: 1}


def test_names_that_lead_out_of_a_folder():
    for name in ("../x", "a/../../x", "/etc/passwd", "..", "a/.."):
        with pytest.raises(ValueError, match=f"^table: row 3: '{name}' leads out of data/images"):
            inside(Path("data/images"), name, "table: row 3")
    for name in ("x", "a/b.png", "a..b", "...", ""):
        assert inside(Path("data/images"), name, "") == Path("data/images") / name


def test_views_are_shown_from_pa_to_lateral():
    views = ["LATERAL", "", "AP", "LL", "PA LLD", "unknown", "Frontal", "PALM", "antero-posterior", " pa ", "AP AXIAL"]
    paths, fault, known = frontal_first((Path(view or "none"), view) for view in views)
    assert [str(path) for path in paths] == ["PA LLD", " pa ", "AP", "Frontal", "antero-posterior", "AP AXIAL", "none",
                                             "unknown", "LATERAL", "LL", "PALM"]  # fmt: skip
    assert (fault, known) == ("", True)
    assert frontal_first([]) == ([], "no image file", True)
    assert frontal_first([(Path("a"), "")]) == ([Path("a")], "", False)
    assert frontal_first([(Path("a"), view) for view in ("LAO", "SWIMMERS")])[1:] == ("lateral view only", True)
