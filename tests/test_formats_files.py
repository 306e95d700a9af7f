"""files.py: exact labels, and what text, JSON and CSV files may be like."""

import pytest

from formats.files import exact_labels


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
