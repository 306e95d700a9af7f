"""Evaluation: reports of every policy of a run against the references and, on the phantom, against the exact truth.

    python evaluate.py --run runs/phantom                              # base and every stage of the run
    python evaluate.py --run R --policy sft,path/to/adapter --split val
    python evaluate.py --predictions P.jsonl --references R.jsonl      # rows {"id", "report"}; no model needed
    python evaluate.py --compare R/stage1 R/stage2                     # paired differences, also over several seeds
    python evaluate.py --image X.png --run R --attention OUT.png       # one report (PNG, JPG or DICOM), and a picture
    torchrun --nproc-per-node 8 evaluate.py --run-dir R                # studies shared out over the GPUs

A policy writes greedy reports and `eval.samples` sampled ones. Always beside it stand two rows that need no eyes: the
fixed normal template, and the policy with its images shuffled among the studies (does it look?). What is scored is the
text between the <report> tags; where an output is not one tagged report, its text with the tags stripped (`format`
shows how often). How each number is made: evidence/metrics.py. What a report states is read by evidence/reader.py,
which shares no code with the rewards. In `<run>/eval/<split>/`: `<policy>/results.json`, `<policy>/reports.jsonl`, and
`results.md` and `results.json` over all policies evaluated there.

Without --config, the settings are those the run was trained with; flags win.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config
from data import load_studies
from evidence.attention import draw_image
from evidence.baselines import COPIES
from evidence.compare import compare
from evidence.forced_choice import forced_choice
from evidence.generate import generate_split
from evidence.inputs import begin, find_policies, normal_template, one_policy, read_pairs
from evidence.judge import Judge, Outputs, Wanted, describe
from evidence.tables import finish
from formats.images import read_image
from model import load_policy
from phantom.assets import resolve
from rewards import OPEN, strip_tags, wrap
from rollout import generate_reports
from running import parallel
from running.folder import write_text
from scorers.load import may_judge

Written = tuple[str, Path | None, Outputs, Outputs | None, tuple[dict, dict]]


@dataclass
class EvalRun(Config):
    # `base`, names of folders inside the run, or adapter folders, separated by commas; empty = base and all of the run
    # (with --image: its last stage) [ours]
    policy: str = ""
    split: str = ""  # split to evaluate; empty = data.test_split [ours]
    predictions: str = ""  # score this .jsonl of {"id", "report"} instead of a policy [ours]
    # the .jsonl of {"id", "report"} that --predictions are scored against; "labels" too, where known [ours]
    references: str = ""
    # paired differences of evaluated policies to the first: stage folders, or quoted globs over seeds [ours]
    compare: tuple[str, ...] = ()
    image: str = ""  # write the report of this one image: PNG, JPG or DICOM [ours]
    attention: str = ""  # with --image: a PNG of where the policy looks while it writes each sentence [ours]


def evaluate(
    cfg: EvalRun, wanted: Wanted, written: Iterable[Written], folder: Path, *,
    without: Collection[str], tagged: bool = True, shuffled_as: str = "image shuffled", notes: Iterable[str] = (),
) -> None:  # fmt: skip
    """Score reports, save each policy's results in `folder`, then print the table of all policies evaluated there.

    written: (name of the policy, its adapter, greedy outputs, sampled outputs or None, what forced_choice.py gave or
    empty ones), one policy after another.
    shuffled_as, notes: what the tables say. without, tagged: see Judge.
    """
    first, n = parallel.rank() == 0, len(wanted.ids)
    if without:
        notes = [*notes, f"not scored for want of {', '.join(without)}: the phantom's scorers know only its reports"]
    if first:
        judge = Judge(cfg, wanted, without, tagged)
        always = judge.always(normal_template(wanted, cfg.data))
    parallel.barrier()  # loading the judge may take longer than a process waits for another inside a pass
    for name, adapter, greedy, sampled, (aucs, forced) in written:  # every process writes, the first one scores
        if first:
            stats = judge.rows(greedy, sampled, derangement(n, cfg.seed) if n > 1 else ()) | always
            stats["greedy"] |= forced
            about = {"adapter": str(adapter or ""), "shuffled_as": shuffled_as, "forced_choice": aucs}
            judge.save(folder / name, about | {"notes": [*notes, *judge.notes()]}, greedy, sampled, stats)
        parallel.barrier()  # and so may judging
    if first:
        finish(folder, describe(cfg, wanted), {} if cfg.predictions else vars(cfg.rewards))
    parallel.barrier()


def evaluate_run(cfg: EvalRun) -> None:
    """Evaluate the chosen policies of a run on a split."""
    split, copies = cfg.split or cfg.data.test_split, COPIES if cfg.data.labels else {}
    policies = find_policies(Path(cfg.run), cfg.policy, copies)
    without = may_judge(cfg, with_expert=False)
    expert = ["expert"] * ("retrieved" in policies)
    cfg = resolve(cfg, ("data", "base", *expert) if without else ("data", "base", "labeller", *expert))
    studies = load_studies(cfg.data, split)

    def written() -> Iterator[Written]:
        model = None
        for name, adapter in policies.items():
            if adapter is None and name in COPIES:
                yield name, None, [[wrap(report)] for report in COPIES[name](cfg, studies)], None, ({}, {})
                continue
            del model  # before the next one is loaded
            model, processor = load_policy(cfg, adapter)
            greedy, sampled = generate_split(model, processor, studies, cfg, what=f"{name}: greedy"), None
            if cfg.eval.samples:
                what = f"{name}: {cfg.eval.samples} samples"
                sampled = generate_split(model, processor, studies, cfg, cfg.eval.samples, what)
            looks = forced_choice(model, processor, studies, cfg) if cfg.data.labels else ({}, {})
            yield name, adapter, greedy, sampled, looks

    evaluate(cfg, Wanted.of(split, studies), written(), Path(cfg.run) / "eval" / split, without=without)


def evaluate_predictions(cfg: EvalRun) -> None:
    """Score a file of reports; the phantom's scorers and the truth join only where the references have labels."""
    if not cfg.references:
        raise ValueError("--predictions needs --references")
    wanted, reports, notes = read_pairs(cfg.predictions, cfg.references)
    without = may_judge(cfg, with_expert=False, on_phantom=wanted.labels is not None)
    path, outputs = Path(cfg.predictions), [[report] for report in reports]
    tagged = any(OPEN in report for report in reports)  # another system may know no tags at all
    evaluate(cfg if without else resolve(cfg, ("labeller",)), wanted, [(path.stem, None, outputs, None, ({}, {}))],
             path.with_name(f"{path.stem}_eval"), without=without, notes=notes, tagged=tagged,
             shuffled_as="references shuffled")  # fmt: skip


def report_image(cfg: EvalRun) -> None:
    """Print the greedy report of one image and write it to `<run>/images/<path of the image>.txt`."""
    image, run = read_image(cfg.image), Path(cfg.run)
    last = next((name for name in ("stage2", "stage1", "sft") if (run / name / "adapter").exists()), "")
    if not cfg.policy and not last:
        raise ValueError(f"{run} has no trained policy; name one with --policy (base: the model alone)")
    name, adapter = one_policy(run, cfg.policy or last)
    cfg = resolve(cfg, ("base",))
    model, processor = load_policy(cfg, adapter)
    text = strip_tags(generate_reports(model, processor, [[image]], cfg, ids=[cfg.image], samples=0)[0][0])
    if cfg.attention:
        draw_image(model, processor, image, cfg, Path(cfg.attention))
    # its whole path, as R2Gen calls every study's first image 0.png
    path = run / "images" / f"{str(Path(cfg.image).resolve()).lstrip('/')}.txt"
    write_text(path, text + "\n")
    print(f"{text}\n\n{name}, written to {path}. Not for clinical use.")


def derangement(n: int, seed: int) -> list[int]:
    """A random cyclic order of 0..n-1, n > 1: a permutation that leaves nothing in its place."""
    order = np.random.default_rng(seed).permutation(n)
    places = np.empty(n, dtype=int)
    places[order] = np.roll(order, 1)
    return places.tolist()


@parallel.script("evaluate.py")
def main() -> None:
    cfg = begin(EvalRun(), __doc__)
    if parallel.world() > 1 and (cfg.compare or cfg.image or cfg.predictions):
        raise ValueError("several processes are for --run; start this without torchrun")
    if cfg.attention and not cfg.image:
        raise ValueError("--attention is for the report of one --image")
    if cfg.compare:
        print(compare(cfg.compare, cfg.split or cfg.data.test_split))
    elif cfg.image:
        report_image(cfg)
    else:
        (evaluate_predictions if cfg.predictions else evaluate_run)(cfg)


if __name__ == "__main__":
    main()
