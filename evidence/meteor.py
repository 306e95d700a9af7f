"""METEOR 1.5 [Denkowski & Lavie 2014]: the jar in pycocoevalcap counts what agrees, `corpus_meteor` scores the counts.

Apart, because the score of a corpus, and of every bootstrap resample of it, is a function of the summed counts.
"""

import contextlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
from pycocoevalcap.meteor import meteor as package
from tqdm import tqdm

JAR = Path(package.__file__).with_name("meteor-1.5.jar")
COMMAND = ["java", "-XX:+UseSerialGC", "-Xmx2G", "-jar", JAR.name, "-", "-", "-stdio", "-l", "en", "-norm"]
COUNTS = 23  # that the jar gives a pair
LONGEST = 1000  # words of a text; the jar's memory grows with both texts' lengths, and at 5,000 it dies
BATCH = 200  # pairs on their way: fewer than would fill the pipe with answers that nobody reads
# its English "rank" parameters, the default; the weights are of the exact, stem, synonym and paraphrase matchers
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([[1.0], [0.6], [0.8], [0.6]])


def corpus_meteor(sums: np.ndarray) -> np.ndarray:
    """(..., 23) sums of the jar's counts -> (...): METEOR, 0 where nothing agrees.

    The counts are: lengths (candidate, reference), function words (both), for each matcher the content words (both)
    and function words (both) it matched, chunks, matched words (both).
    """
    words, function_words = sums[..., :2], sums[..., 2:4]  # (..., side)
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # (..., matcher, count)
    found = DELTA * matches[..., :2] + (1 - DELTA) * matches[..., 2:]  # (..., matcher, side)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (WEIGHTS * found).sum(-2) / (DELTA * (words - function_words) + (1 - DELTA) * function_words)
        mean = 1 / ((1 - ALPHA) / share[..., 0] + ALPHA / share[..., 1])  # of precision and recall
        penalty = GAMMA * (sums[..., 20] / ((sums[..., 21] + sums[..., 22]) / 2)) ** BETA
    return np.nan_to_num(mean * (1 - penalty))


class Meteor:
    """The jar's Java process as a function: (candidates, references) -> (m, 23) counts of the pairs.

    None where there is no METEOR: no Java, or the process died, and a new one waits for the next texts; `note` then
    says so in one line.
    """

    def __init__(self):
        self.note, self.process = "", self.start()  # now, as it takes ten seconds to load

    def start(self) -> subprocess.Popen | None:
        """The process; None without Java."""
        if shutil.which("java") is None:
            return None
        return subprocess.Popen(COMMAND, cwd=JAR.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace")  # fmt: skip

    def __call__(self, candidates: list[str], references: list[str]) -> np.ndarray | None:
        if self.process is None:
            self.note = "METEOR needs Java: no `java` on PATH"
            return None
        lines, rows = [self.line(*pair) for pair in zip(references, candidates, strict=True)], []
        with contextlib.suppress(BrokenPipeError):
            for start in tqdm(range(0, len(lines), BATCH), "METEOR", delay=5, mininterval=1, leave=False):
                batch = lines[start : start + BATCH]
                self.process.stdin.writelines(batch)
                self.process.stdin.flush()
                rows += [row for _ in batch if len(row := self.process.stdout.readline().split()) == COUNTS]
        if len(rows) < len(lines):
            self.note = f"METEOR is not available: its Java process ended after {len(rows)} of {len(lines)} reports"
            self.process = self.start()
            return None
        counts = np.array(rows, float)
        whole = (counts[:, 21] == counts[:, 0]) & (counts[:, 22] == counts[:, 1]) & (counts[:, 20] == 1)
        counts[whole, 20] = 0  # as the jar does before it adds up: a perfect match in one chunk pays for none
        return counts

    def line(self, *texts: str) -> str:
        """A reference and a candidate as the jar's question: one line, and its separator nowhere inside a text."""
        words = [text.replace("|||", " ").split() for text in texts]
        if max(map(len, words)) > LONGEST:
            self.note = f"METEOR: of texts longer than {LONGEST:,} words the first {LONGEST:,}"
        return " ||| ".join(("SCORE", *(" ".join(of[:LONGEST]) for of in words))) + "\n"
