"""The README's recipe for a new reward, done to a copy of the code word by word: it works, and the tests of the rewards
and of the house's walls stay green; so does this one in a checkout that has followed it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def insert(path: Path, before: str, text: str) -> None:
    """Put `text` before the line that begins with `before`, which must stand there once."""
    source = path.read_text(encoding="utf-8")
    assert source.count(f"\n{before}") == 1, before
    path.write_text(source.replace(f"\n{before}", f"\n{text}{before}"), encoding="utf-8")


def test_a_reward_in_ten_lines(tmp_path):
    recipe = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Change one thing")[2].partition("\n## ")[0]
    function, component, weighing, field, test = re.findall(r"```python\n(.*?)```", recipe, flags=re.DOTALL)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("phantom/*"), *ROOT.glob("evidence/*.jinja"),
                 ROOT / "pyproject.toml"]:  # fmt: skip
        if path.is_file() and path.parent.name not in ("benchmarks", ".venv"):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
    rewards = tmp_path / "rewards.py"
    if "def brevity(" not in rewards.read_text(encoding="utf-8"):
        insert(rewards, "def text_components(", f"{function}\n\n")
        insert(rewards, '        "bertscore": scorers.bertscore(', component)
        insert(rewards, "    return total\n", weighing)
        insert(tmp_path / "config.py", "    lambda_format: Weight", field)
        with (tmp_path / "tests" / "test_rewards.py").open("a", encoding="utf-8") as tests:
            tests.write(f"\n\n{test}")
    tests = [f"tests/test_{name}.py" for name in ("rewards", "walls")]
    words = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    script = """
from config import parse
from rewards import Scorers, compute_rewards
half = lambda candidates, references: [0.5] * len(candidates)
scorers, texts = Scorers(None, half, None, None), [["<report> a b c </report>", "<report> a b </report>"]]
totals = []
for weight in ("0", "2"):
    cfg = parse(argv=["--rewards.lambda-brevity", weight]).rewards
    total, parts = compute_rewards(texts, ["a b"], [None], ["id"], scorers, cfg, k=1, stage=1)
    totals.append(total[0])
    assert parts["brevity"].tolist() == [[0.5, 1.0]]
assert (totals[1] - totals[0]).tolist() == [1.0, 2.0]
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
