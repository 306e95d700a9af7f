"""RaTEScore [Zhao et al. 2024, arXiv 2406.16845] from an environment of its own: its package needs older libraries.

    python3 -m venv .ratescore                                                # once; its models come on first use
    .ratescore/bin/pip install RaTEScore==0.6.0 medspacy torch transformers pandas safetensors
    python evaluate.py ... --eval.ratescore .ratescore/bin/python

The package's two models run on this machine: no text leaves it, and HF_HUB_OFFLINE=1 keeps it to models in the Hugging
Face cache. It gives 0.5 to a pair in which either text has no medical entity. A text without any sentence of three
characters scores 0 here: the package drops it, and every later score would slip to the pair before.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def load_ratescore(python: str):
    """score(candidates, references) -> one RaTEScore in [0, 1] per pair, computed by the interpreter `python`.

    ValueError (one line) when it does not run or has no RaTEScore, or when the scoring fails.
    """
    run_python(python, "-c", "import RaTEScore")

    def score(candidates: list, references: list) -> list:
        from scorers.frozen import plain  # not on top: the other environment reads this file too

        with tempfile.TemporaryDirectory() as folder:  # readable by this user alone, and gone afterwards
            pairs, scores = Path(folder) / "pairs.jsonl", Path(folder) / "scores.jsonl"
            rows = [[plain(c), plain(r)] for c, r in zip(candidates, references, strict=True)]
            pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            run_python(python, __file__, str(pairs), str(scores))
            return [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]

    return score


def run_python(python: str, *words: str) -> None:
    """Run the other environment's interpreter; ValueError with the last line of what it said when it fails."""
    try:  # -I: neither this folder (whose expert.py a package might mean) nor PYTHONPATH is searched for modules
        subprocess.run([python, "-I", *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "").strip() or str(error)).splitlines()[-1]
        raise ValueError(f"eval.ratescore: no RaTEScore from {python} ({why}); set it up as {__file__} says") from None


def main() -> None:
    """Read the pairs, write their scores; runs in the other environment, which has the three packages."""
    import torch
    from RaTEScore import RaTEScore
    from RaTEScore.utils import sentence_split

    scorer = RaTEScore(use_gpu=torch.cuda.is_available())
    with open(sys.argv[1], encoding="utf-8") as pairs, open(sys.argv[2], "w", encoding="utf-8") as scores:
        for report, reference in map(json.loads, pairs):
            whole = sentence_split([report])[0] and sentence_split([reference])[0]
            print(float(scorer.compute_score([report], [reference])[0]) if whole else 0.0, file=scores)


if __name__ == "__main__":
    main()
