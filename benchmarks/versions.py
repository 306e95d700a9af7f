"""Two versions of this project on the same work, in turn, in one run: what did a change do to the speed?

    git worktree add ../before COMMIT
    python benchmarks/versions.py ../before

The other checkout's step, sampling and loss pass (its own benchmarks/sides.py) beside this one's, as bench.py measures
a peer; both use this environment's packages. Written to benchmarks/results/versions.md.
"""

import subprocess
import sys
from pathlib import Path

from bench import HERE, PAIRS, SHORT, SIDES, Load, Side, machine, row_of
from sides import Case

REPEATS = 9  # of each order


def commit_of(checkout: Path) -> str:
    """`af786ea Move what serves the method into six rooms`."""
    words = ["git", "-C", str(checkout), "log", "-1", "--format=%h %s"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def compare_versions(name: str, places: dict[str, Path]) -> dict:
    """Seconds of one of sides.py's functions in both `places`, repeat by repeat in turn, and their peaks.

    Twice, each version once as the first to start: the second process to start is slower by some percent here.
    """
    seconds, peak, load = {side: [] for side in places}, dict.fromkeys(places, 0), Load()
    for order in (list(places), list(places)[::-1]):
        sides = {}
        try:
            for side in order:
                sides[side] = Side(name, Case(), places[side])
            for _ in range(REPEATS):
                for side in order:
                    with load.measured():
                        seconds[side].append(sides[side].run())
            peak |= {side: max(peak[side], sides[side].end()) for side in order}
        finally:
            for side in sides.values():
                side.process.kill()
    return {"seconds": seconds, "peak": peak, "load": load.mean()}


def main(other: Path) -> None:
    places = dict(zip(SIDES, (other / "benchmarks", HERE), strict=True))
    lines = ["# This version beside an earlier one", "",
             f"Before: {commit_of(other)}. Now: {commit_of(HERE)}. {machine()}; {2 * REPEATS} repeats in turn after a "
             "warm-up of each, in both orders; median and range; the standard case of bench.py.", "",
             "| case | before, s | now, s | before / now | before, MiB | now, MiB | now / before | load |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for case, (_, ours, _) in PAIRS.items():
        lines.append(row_of(SHORT[case], compare_versions(ours, places)))
        print(lines[-1], flush=True)
    (HERE / "results" / "versions.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "benchmarks", "sides.py").is_file():
        sys.exit("versions: give the folder of another checkout, one with benchmarks/sides.py")
    main(Path(sys.argv[1]))
