"""What an update leaves in a stage's folder: metrics.jsonl and TensorBoard, and now and then a group of candidates.

After a kill, rows written since the last checkpoint are dropped and written again, so each k stands once.
"""

import json
import math
import threading
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from formats.files import require_regular
from rollout import Rollout
from running.folder import private, write_text, writing


class Log:
    """metrics.jsonl, samples.jsonl and TensorBoard of a stage that began after k0, written by the first process."""

    def __init__(self, folder: Path, k0: int, done: int, active: bool = True):
        self.folder, self.active = folder, active
        if active:
            lost = done - keep_rows(folder / "metrics.jsonl", k0, k0 + done)
            if lost:
                print(f"{folder / 'metrics.jsonl'}: the rows of {lost} earlier updates are lost; the weights are not")
            keep_rows(folder / "samples.jsonl", k0, k0 + done)
            threading.excepthook = quiet
            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=k0 + done + 1)

    def write(self, k: int, row: dict[str, float], sample: dict | None = None) -> None:
        """Append the row of update k, and a group of candidates where one is given."""
        if not self.active:
            return
        append(self.folder / "metrics.jsonl", {"k": k} | row)
        if sample is not None:
            append(self.folder / "samples.jsonl", sample)
        with writing(self.folder / "tb", 100 * len(row)):
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, k)

    def close(self) -> None:
        if self.active:
            with writing(self.folder / "tb", 0):
                self.tensorboard.close()


def quiet(thread) -> None:
    """Prints no traceback of a full disk: TensorBoard's thread hands its OSError to the next write, which is a line."""
    if not issubclass(thread.exc_type, OSError):
        threading.__excepthook__(thread)


def append(path: Path, row: dict) -> None:
    """Add one line to a .jsonl."""
    line = json.dumps(row) + "\n"
    with writing(path, len(line)), open(path, "a", encoding="utf-8", opener=private) as file:
        file.write(line)


def keep_rows(path: Path, k0: int, last_k: int) -> int:
    """Keep the rows of updates k0 + 1 to `last_k`, each once and in order; their number.

    Those after it, and a last line that a kill cut short, will be written again; a line says which others are dropped.
    """
    rows, bad = {}, []
    require_regular(path)
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n")[:-1] if path.exists() else (), 1):
        try:
            k = json.loads(line)["k"]
        except (ValueError, LookupError, TypeError, RecursionError):
            k = None
        if type(k) is not int or k <= k0 or k in rows:
            bad.append(number)
        elif k <= last_k:
            rows[k] = line + "\n"
    if bad:
        print(f"{path}: line {bad[0]} and {len(bad) - 1} others without a k of their own are left out")
    if path.exists():
        write_text(path, "".join(rows[k] for k in sorted(rows)))
    return len(rows)


def group_metrics(out: Rollout, rewards: Tensor, parts: dict[str, Tensor]) -> dict[str, list[float]]:
    """Per-study metrics of a rollout: mean and spread inside the group of each reward (B, G), length, entropy, rates.

    NaN, the similarity of a candidate that is not readable, does not count.
    """
    found = {}
    for name, values in {"total": rewards, **parts}.items():
        mean = values.nanmean(dim=1)  # (B,)
        found[f"reward/{name}"] = mean.tolist()
        found[f"spread/{name}"] = (values - mean[:, None]).square().nanmean(dim=1).sqrt().tolist()
    lengths = out.completion_mask.sum(dim=1)  # (N,)
    per_row = {
        "length": lengths.float(),
        # mean -log p of the sampled tokens: estimates the entropy of the distribution they were drawn from, so with
        # top_k or top_p, whose tails `logps` still hold, it is a cross-entropy a little above that
        "entropy": -out.logps.sum(dim=1) / lengths,
        "finished_rate": out.finished.float(),
        "format_rate": parts["format"].flatten(),
    }
    return found | {name: x.view(rewards.shape).mean(dim=1).tolist() for name, x in per_row.items()}


def average(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    """Mean of each metric over all studies of all processes; what is NaN everywhere is left out."""
    row = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [v for part in parts for v in part.get(name, []) if not math.isnan(v)]
        if values:
            row[name] = sum(values) / len(values)
    return row


def shown(row: dict[str, float]) -> dict[str, str]:
    """What stands behind the progress bar."""
    return {name.split("/")[-1]: f"{row[name]:.3f}" for name in ("loss", "reward/total", "kl") if name in row}
