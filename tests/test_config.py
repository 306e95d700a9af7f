import subprocess
import sys
from pathlib import Path

import pytest

from config import Config, load_toml, merge, parse, to_dict
from evidence import demo
from running.folder import flatten

ROOT = Path(__file__).parents[1]


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "c.toml").write_text("seed = 3\n[grpo]\nlr = 1e-4\nbeta = 0.5\n[rewards]\nrequired_sections = []\n")
    cfg = parse(argv=["--grpo.lr", "1e-5", "--config", str(tmp_path / "c.toml"), "--stage", "2"])
    assert (cfg.seed, cfg.grpo.lr, cfg.grpo.beta, cfg.stage) == (3, 1e-5, 0.5, "2")
    assert cfg.rewards.required_sections == () and cfg.grpo.batch_size == Config().grpo.batch_size


@pytest.mark.parametrize(
    "text, message",
    [
        ("[grpo]\nlearning_rate = 1\n", "unknown key 'grpo.learning_rate'; known here: batch_size"),
        ("grpo = 1\n", "'grpo' must be a table"),
        ("seed = {a = 1}\n", "'seed' must be a value"),
        ("seed = \n", "Invalid value"),
        ("[rewards]\nlambda_vis = 'half'\n", "'rewards.lambda_vis' must be float, not 'half'"),
        ("seed = 1.5\n", "'seed' must be int, not 1.5"),
        ("[data]\nstrict = 1\n", "'data.strict' must be bool, not 1"),
        ("run = 3\n", "'run' must be str, not 3"),
        ("[rewards]\nrank = 'hard'\n", "'rewards.rank' must be one of soft, literal, not 'hard'"),
        ("[rewards]\nrequired_sections = [1]\n", "'rewards.required_sections' must be a list of str, not [1]"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_key(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(SystemExit) as error:
        load_toml(str(tmp_path / "c.toml"), Config())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_whole_numbers_stand_for_floats_and_stages(tmp_path):
    (tmp_path / "c.toml").write_text("stage = 2\n[grpo]\nbeta = 1\n")
    cfg = parse(argv=["--config", str(tmp_path / "c.toml")])
    assert cfg.stage == "2" and cfg.grpo.beta == 1.0 and isinstance(cfg.grpo.beta, float)


def test_a_missing_file_is_named():
    with pytest.raises(SystemExit, match="nowhere.toml does not exist"):
        parse(argv=["--config", "nowhere.toml"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rewards.lambda-lex", "0.7"], "lambda_lex .* must be 1, got 1.2"),
        (["--rollout.group-size", "1"], "group_size must be at least 2"),
        (["--rewards.lambda-vis", "1.5"], "lambda_vis must be in"),
        (["--rollout.top-p", "0"], "top_p must be in"),
        (["--rewards.lambda-cx", "-1"], "lambda_cx must not be negative"),
    ],
)
def test_contradictions_are_errors(flags, message):
    with pytest.raises(SystemExit, match=message):
        parse(argv=flags)


def test_the_shipped_configs_parse():
    for path in sorted((ROOT / "configs").glob("*.toml")):
        assert isinstance(parse(argv=["--config", str(path)]), Config)


def test_a_dumped_config_reads_back():
    cfg = parse(argv=["--seed", "7", "--rewards.rank", "literal"])
    assert merge(Config(), to_dict(cfg)) == cfg
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}


def test_every_field_says_where_it_comes_from():
    """--help shows the docstring under each field; each ends with its source in brackets."""
    for file in ("config.py", "phantom/config.py"):
        lines = (ROOT / file).read_text().splitlines()
        fields = [i for i, line in enumerate(lines) if line.startswith("    ") and ": " in line and " = " in line]
        fields = [i for i in fields if lines[i].split(":")[0].strip().isidentifier()]
        fields = [i for i in fields if lines[i + 1].startswith("    " + 3 * chr(34))]
        assert len(fields) > 20
        for i in fields:
            end = next(j for j in range(i + 1, i + 6) if lines[j].endswith('"""'))
            assert lines[end].endswith(']"""'), f"{file}: {lines[i]}"


def test_help_explains_the_fields():
    out = subprocess.run([sys.executable, "-c", "from config import parse; parse()", "--help"], cwd=ROOT,
                         capture_output=True, text=True).stdout  # fmt: skip
    assert "--grpo.lr" in out and "--config FILE.toml" in out and "DeepSeekMath" in out


@pytest.mark.parametrize("flag", ["--save-every", "--sft.micro-batch", "--grpo.micro-batch", "--eval.batch-size"])
def test_counts_that_divide_must_not_be_zero(flag):
    with pytest.raises(SystemExit, match=f"{flag[2:].replace('-', '_')} must be at least 1"):
        parse(Config, argv=[flag, "0"])


def test_run_has_a_name_that_torchrun_leaves_alone():
    """torchrun reads `--run` as its own --run-path, even behind the script's name."""
    assert parse(Config, argv=["--run-dir", "runs/x"]).run == parse(Config, argv=["--run", "runs/x"]).run == "runs/x"
    words = demo.command("train.py", ["--run", "a", "--run=b", "--stage", "1"], processes=2)
    assert words[-4:] == ["--run-dir", "a", "--run-dir=b", "--stage", "1"][-4:] and "--run" not in words
    assert demo.command("train.py", ["--run", "a"])[-2:] == ["--run", "a"]


def test_negative_steps_are_refused():
    with pytest.raises(SystemExit, match="stage2.steps must not be negative"):
        parse(Config, argv=["--stage2.steps", "-1"])


@pytest.mark.parametrize("argv", [["--config"], ["--config", "configs"], ["--config", "nowhere.toml"]])
def test_a_config_that_is_no_file_is_one_line(argv):
    with pytest.raises(SystemExit, match="^config: "):
        parse(Config, argv=argv)
