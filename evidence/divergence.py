"""What each text reward makes of two sentences that differ in a negation, a side, a severity or the wording alone.

    python -m evidence.divergence        # in percent: means over the pairs of a kind, then each pair

A reward tells a changed truth where it pays less for it than for another wording. The scorers are loaded as a run loads
them: the phantom's, which learnt its English alone, or real ones by `--scorers.*`. The pairs: divergence.csv.
"""

from pathlib import Path

import pandas as pd

from config import Config, parse
from phantom.assets import resolve
from rewards import Scorers, text_components
from running import parallel
from scorers.load import load_scorers


def divergence(pairs: pd.DataFrame, scorers: Scorers) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(mean by English and kind of difference, each pair) of every text reward in percent, as columns."""
    parts = text_components([*pairs["candidate"]], [*pairs["reference"]], scorers, clinical_too=True)
    each = pairs.join(100 * pd.DataFrame(parts))
    return each.groupby(["English", "differs"], sort=False).mean(numeric_only=True).reset_index(), each


@parallel.script("divergence")
def main() -> None:
    cfg, pairs = parse(Config, __doc__), pd.read_csv(Path(__file__).with_name("divergence.csv"))
    tables = divergence(pairs, load_scorers(resolve(cfg, ("labeller",)), with_expert=False))
    print(*(table.to_markdown(index=False, floatfmt=".0f") for table in tables), sep="\n\n")


if __name__ == "__main__":
    main()
