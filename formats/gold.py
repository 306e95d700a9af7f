"""Gold labels of IU-Xray: what people coded in each study's report, as the findings that an evaluation counts.

Two tables beside the data set's own files; gold_labels.toml says which columns and headings of theirs make a finding:

- the one that `data.labels` names: "id" or "filename", which begins with CXR and the study's uid (CXR12_IM-0034: 12),
  and a column of 0 and 1 for each class of NIH's ChestX-ray14 ("Atelectasis", ...): NegBio's openi_gld_std14.csv.
  Other columns are not looked at.
- `reports.csv` or `indiana_reports.csv`, the Kaggle table: "uid" and "MeSH", Open-i's coding, headings with qualifiers:
  "Cardiomegaly/mild;Pleural Effusion/left/small". A side stands among the qualifiers, or in "lingula", "middle lobe".

A finding is there where either table has it: "cardiomegaly", "effusion_left", both sides of a bilateral one, and plain
"effusion" where no side is told. 3% of the reports are coded "No Indexing": to these tables they have no finding.
"""

import re
import tomllib
from pathlib import Path

from formats.files import read_csv

RULES = tomllib.loads(Path(__file__).with_name("gold_labels.toml").read_text(encoding="utf-8"))
SIDES, FINDINGS = RULES.pop("sides"), tuple(RULES["findings"])
COLUMNS = sorted({column for table in RULES.values() for rule in table.values() for column in rule["columns"]})


class Gold:
    """The tables, of which `coded` tells a study's labels.

    ValueError, one line, for a table or column that is not there, another value than 0 or 1, a study that occurs twice
    in the table `name`, or has no row in one of the two.
    """

    def __init__(self, folder: Path, name: str):
        self.path, names = folder / name, ("reports.csv", "indiana_reports.csv")
        self.mesh_path = next((folder / other for other in names if (folder / other).exists()), folder / names[0])
        self.mesh, self.rows = {}, {}
        for row in read_csv(self.mesh_path, ("uid", "MeSH")):
            self.mesh[row["uid"]] = [heading.strip().split("/") for heading in row["MeSH"].split(";")]
        for number, row in enumerate(read_csv(self.path, COLUMNS), 2):
            study = row.get("id") or row.get("filename") or ""
            where, uid = f"{self.path}: line {number} ({study})", uid_of(study)
            if not uid or uid in self.rows:
                raise ValueError(f"{where}: {'occurs twice' if uid else 'no id such as CXR12_IM-0034 or CXR12'}")
            if odd := [column for column in COLUMNS if row[column] not in ("0", "1")]:
                raise ValueError(f"{where}: {odd[0]} is {row[odd[0]][:20]!r}, neither 0 nor 1")
            self.rows[uid] = row

    def coded(self, study_id: str, table: str) -> list[str]:
        """What of a table of gold_labels.toml, `findings` or `chexpert`, a study has, in its order."""
        uid = uid_of(study_id)
        for path, known in ((self.path, self.rows), (self.mesh_path, self.mesh)):
            if uid not in known:
                raise ValueError(f"{path}: no row for study {study_id}")
        return met(RULES[table], self.rows[uid], self.mesh[uid])


def uid_of(study_id: str) -> str:
    """Open-i's number of a study, "12" for CXR12_IM-0034, CXR12_1_IM-0034, CXR12 and 12; "" for another name."""
    match = re.match(r"(?:CXR)?(\d+)(?![^_])", study_id)
    return match[1] if match else ""


def met(rules: dict[str, dict], row: dict[str, str], headings: list[list[str]]) -> list[str]:
    """The names in `rules` met by a row of 0 and 1, or by one of the MeSH headings [[heading, qualifier, ...], ...]."""
    found = []
    for name, rule in rules.items():
        wanted = [pattern.split("/") for pattern in rule["mesh"]]
        hits = [h for h in headings if any(h[0] == first and {*more} <= {*h} for first, *more in wanted)]
        sides = sorted({side for hit in hits for word in hit for side in SIDES.get(word, ())})
        if rule.get("sided") and sides:
            found += [f"{name}_{side}" for side in sides]
        elif hits or any(row[column] == "1" for column in rule["columns"]):
            found.append(name)
    return found


def plain(labels: list[str]) -> list[str]:
    """The findings of `labels` without their sides, each once."""
    return list(dict.fromkeys(label.partition("_")[0] for label in labels))
