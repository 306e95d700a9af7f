"""gold.py on made tables, by hand; and on the real ones where they are."""

from collections import Counter
from pathlib import Path

import pytest
from test_data import config, r2gen, row

import data
from formats.gold import COLUMNS, FINDINGS, RULES, Gold, plain, uid_of

REAL = Path(__file__).parents[2] / "shared" / "data" / "iu_xray"


def tables(folder: Path, rows: dict[str, tuple[str, ...]], mesh: dict[str, str], first: str = "id") -> Path:
    """The two tables: {id: NIH classes that are 1}, {uid: MeSH}."""
    lines = [",".join([first, *COLUMNS, "normal"])]
    lines += [",".join([study, *(str(int(column in ones)) for column in COLUMNS), "0"]) for study, ones in rows.items()]
    (folder / "gold.csv").write_text("\n".join(lines) + "\n")
    (folder / "reports.csv").write_text("uid,MeSH,findings\n" + "".join(f'{u},"{m}",x\n' for u, m in mesh.items()))
    return folder


@pytest.mark.parametrize(
    ("ones", "mesh", "expected"),
    [
        ((), "normal", []),
        ((), "No Indexing", []),
        (("Cardiomegaly", "Effusion"), "Cardiomegaly/mild", ["cardiomegaly", "effusion"]),  # the table alone: no side
        ((), "Pleural Effusion/left/small;Pleural Effusion/right", ["effusion_left", "effusion_right"]),
        (("Effusion",), "Pleural Effusion/bilateral", ["effusion_left", "effusion_right"]),
        (("Nodule", "Mass"), "Nodule/lung/lingula", ["nodule_left"]),
        ((), "Opacity/lung/middle lobe/right/patchy;Opacity/abdomen/left", ["opacity_right"]),  # of the lung alone
        ((), "Thoracic Vertebrae/degenerative/mild;Scoliosis/right;Thoracic Vertebrae", ["spine"]),
        ((), "Catheters, Indwelling/right", ["device"]),  # no side is asked of it
        ((), "Cardiac Shadow/mild/enlarged", ["cardiomegaly"]),
        ((), "Lung/hypoinflation;Lung/bilateral/hyperdistention", ["hyperinflation"]),
        (("Emphysema", "Fibrosis"), "Hernia, Hiatal", ["hyperinflation", "scar"]),
    ],
)
def test_findings_by_hand(tmp_path, ones, mesh, expected):
    gold = Gold(tables(tmp_path, {"CXR7_IM-0002": ones}, {"7": mesh}), "gold.csv")
    assert gold.coded("CXR7_IM-0002", "findings") == expected == gold.coded("7", "findings")


def test_negbios_own_table_and_kaggles_name(tmp_path):
    tables(tmp_path, {"CXR7": ("Atelectasis",)}, {"7": "Pulmonary Atelectasis/base/left"}, first="filename")
    (tmp_path / "reports.csv").rename(tmp_path / "indiana_reports.csv")
    assert Gold(tmp_path, "gold.csv").coded("CXR7_1_IM-0001", "findings") == ["atelectasis_left"]
    assert [uid_of(name) for name in ("CXR7_1_IM-0001", "CXR12", "12", "12_x", "train00001", "")] == [
        "7", "12", "12", "12", "", ""]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text.replace("CXR8,1", "CXR8,2"), r"gold.csv: line 3 \(CXR8\): Atelectasis is '2', neither"),
        (lambda text: text.replace("CXR8", "CXR7"), r"gold.csv: line 3 \(CXR7\): occurs twice"),
        (lambda text: text.replace("CXR8", "eight"), r"gold.csv: line 3 \(eight\): no id such as"),
        (lambda text: text.replace("Effusion", "Fluid"), r"gold.csv: no column 'Effusion'"),
        (lambda text: text.replace("CXR8", "CXR9"), "gold.csv: no row for study CXR8_IM"),
        (lambda text: None, "gold.csv: cannot be read"),
    ],
)
def test_a_faulty_table_is_one_line(tmp_path, spoil, said):
    folder = r2gen(tmp_path, {"test": [row("CXR7_IM"), row("CXR8_IM")]})
    tables(folder, {"CXR7": (), "CXR8": ("Atelectasis",)}, {"7": "normal", "8": "normal"})
    studies, _ = data.read_split(config(folder, labels="gold.csv"), "test")
    assert [study.labels for study in studies] == [[], ["atelectasis"]]
    text = spoil((folder / "gold.csv").read_text())
    (folder / "gold.csv").unlink() if text is None else (folder / "gold.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        data.read_split(config(folder, labels="gold.csv"), "test")


def test_chexperts_labels_are_chexberts():
    from scorers.chexbert import CHEXPERT_LABELS

    assert [*RULES["chexpert"]] == [*CHEXPERT_LABELS[:-1]]  # No Finding is where none of them is


def test_no_mesh_for_a_study_is_one_line(tmp_path):
    folder = tables(r2gen(tmp_path, {"test": [row("CXR7_IM")]}), {"CXR7": ()}, {"8": "normal"})
    with pytest.raises(ValueError, match="reports.csv: no row for study CXR7_IM"):
        data.read_split(config(folder, labels="gold.csv"), "test")


@pytest.mark.skipif(not REAL.exists(), reason="the real IU-Xray is not here")
def test_the_real_tables_agree_where_both_code_a_finding():
    """In training and validation every study has labels; MeSH and NIH's classes were coded by the same people."""
    gold, found = Gold(REAL, "gold_labels_nih14.csv"), Counter()
    for split, n in (("train", 2069), ("val", 296)):
        studies, skips = data.read_split(config(REAL, labels="gold_labels_nih14.csv"), split)
        assert len(studies) == n and not skips
        found.update(name for study in studies for name in plain(study.labels))
    assert found.keys() == {*FINDINGS} and found["cardiomegaly"] == 223 and found["nodule"] == 74
    coded = [row for row in gold.rows.values() if row["split"] != "test"]
    both = [(row["Atelectasis"] == "1", bool({h[0] for h in gold.mesh[uid_of(row["id"])]} & {"Pulmonary Atelectasis"}))
            for row in coded]  # fmt: skip
    assert Counter(both) == {(False, False): 2170, (True, True): 195}
