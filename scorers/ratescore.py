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


def load_ratescore(python: str):
    """score(candidates, references) -> one RaTEScore in [0, 1] per pair, computed by the interpreter `python`.

    ValueError (one line) when it does not run or has no RaTEScore, or when the scoring fails.
    """
    ask(python, "-c", "import RaTEScore; print(1)")

    def score(candidates: list[str], references: list[str]) -> list[float]:
        from scorers.frozen import plain  # not on top: the other environment reads this file too

        pairs = [(plain(c), plain(r)) for c, r in zip(candidates, references, strict=True)]
        return ask(python, __file__, given=json.dumps(pairs))

    return score


def ask(python: str, *words: str, given: str = ""):
    """The JSON on the last line that the other environment's interpreter prints.

    ValueError with the last line of its complaint if it fails or prints none.
    """
    try:  # -I: neither this folder (whose expert.py a package might mean) nor PYTHONPATH is searched for modules
        ran = subprocess.run([python, "-I", *words], input=given, capture_output=True, text=True, check=True)
        return json.loads(ran.stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "").strip() or str(error)).splitlines()[-1]
    except (IndexError, ValueError):
        why = "its answer cannot be read"
    raise ValueError(f"eval.ratescore: no RaTEScore from {python} ({why}); set it up as {__file__} says")


def main() -> None:
    """Pairs on stdin, scores on stdout's last line; runs in the other environment, which has the three packages."""
    import torch
    from RaTEScore import RaTEScore
    from RaTEScore.utils import sentence_split

    scorer, scores = RaTEScore(use_gpu=torch.cuda.is_available()), []
    for report, reference in json.load(sys.stdin):
        whole = sentence_split([report])[0] and sentence_split([reference])[0]
        scores.append(float(scorer.compute_score([report], [reference])[0]) if whole else 0.0)
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
