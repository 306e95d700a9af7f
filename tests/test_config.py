import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import Config, flatten, from_recorded, load_toml, merge, parse, to_dict

ROOT = Path(__file__).parents[1]


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "c.toml").write_text("seed = 3\n[grpo]\nlr = 1e-4\nbeta = 0.5\n[rewards]\nrequired_sections = []\n")
    cfg = parse(argv=["--grpo.lr", "1e-5", "--config", str(tmp_path / "c.toml"), "--stage", "2"])
    assert (cfg.seed, cfg.grpo.lr, cfg.grpo.beta, cfg.stage) == (3, 1e-5, 0.5, "2")
    assert cfg.rewards.required_sections == () and cfg.grpo.batch_size == Config().grpo.batch_size


@pytest.mark.parametrize(
    "text, message",
    [
        ("[grpo]\nlearning_rate = 1\n", "grpo.learning_rate: Unexpected keyword argument, got 1"),
        ("grpo = 1\n", "grpo: Input should be an object, got 1"),
        ("[gpro]\nlr = 1\n", "gpro: Unexpected keyword argument"),
        ("seed = {a = 1}\n", "seed: Input should be a valid integer"),
        ("seed = \n", "Invalid value"),
        ("[rewards]\nlambda_vis = 'half'\n", "rewards.lambda_vis: Input should be a valid number, got 'half'"),
        ("seed = 1.5\n", "seed: Input should be a valid integer, got 1.5"),
        ("[data]\nstrict = 1\n", "data.strict: Input should be a valid boolean, got 1"),
        ("run = 3\n", "run: Input should be a valid string, got 3"),
        ("[rewards]\nrank = 'hard'\n", "rewards.rank: Input should be 'soft' or 'literal', got 'hard'"),
        ("[rewards]\nrequired_sections = [1]\n", "rewards.required_sections.0: Input should be a valid string, got 1"),
        ("[rewards]\ntau = nan\n", "rewards.tau: Input should be a finite number"),
        ("seed = 2020-01-01\n", "seed: Input should be a valid integer"),
        ("[foo]\n", "foo: Unexpected keyword argument"),
        ("seed = " + "[" * 5000 + "]" * 5000, "recursion"),
        ("[" + ".".join("a" * 5000) + "]\n", ""),
        ("\x00\x01", "Invalid statement"),
        ("[grpo]\nnum_iterations = 0\nlr = -1\n", "lr: Input should be greater than 0, got -1; grpo.num_iterations: "),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_key(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(SystemExit) as error:
        parse(argv=["--config", str(tmp_path / "c.toml")])
    assert message in str(error.value) and "\n" not in str(error.value) and "c.toml" in str(error.value)


def test_whole_numbers_stand_for_floats_and_stages(tmp_path):
    (tmp_path / "c.toml").write_text("stage = 2\n[grpo]\nbeta = 1\n")
    cfg = parse(argv=["--config", str(tmp_path / "c.toml")])
    assert cfg.stage == "2" and cfg.grpo.beta == 1.0 and isinstance(cfg.grpo.beta, float)


def test_a_file_of_another_encoding_is_one_line_and_a_byte_order_mark_is_nothing(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert parse(argv=["--config", str(tmp_path / "c.toml")]).seed == 3
    for content in (b"\xff\xfes\x00e\x00", b"seed = \x80\n"):
        (tmp_path / "c.toml").write_bytes(content)
        with pytest.raises(SystemExit, match="^config: .*c.toml: .*codec"):
            parse(argv=["--config", str(tmp_path / "c.toml")])


def test_a_missing_file_is_named():
    with pytest.raises(SystemExit, match="nowhere.toml: No such file"):
        parse(argv=["--config", "nowhere.toml"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rewards.lambda-lex", "0.7"], "lambda_lex .* must be 1, got 1.2"),
        (["--rollout.min-new-tokens", "96"], "min_new_tokens must be below"),
        (["--rollout.group-size", "1"], "rollout.group_size: Input should be greater than or equal to 2, got 1"),
        (["--rewards.lambda-vis", "1.5"], "rewards.lambda_vis: .* less than or equal to 1"),
        (["--rollout.top-p", "0"], "rollout.top_p: .* greater than 0"),
        (["--rewards.lambda-cx", "-1"], "rewards.lambda_cx: .* greater than or equal to 0"),
        (["--rewards.tau", "-0.1"], "rewards.tau: .* greater than 0"),  # would turn Eq. 7 upside down
        (["--rewards.tau", "inf"], "rewards.tau: .* finite"),
        (["--grpo.beta", "-1"], "grpo.beta: .* greater than or equal to 0"),
        (["--stage2.steps", "-1"], "stage2.steps: .* greater than or equal to 0"),
        (["--threads", "-1"], "threads: "),
        (["--eval.bootstrap", "10000000"], "eval.bootstrap: .* less than or equal to 100000"),
        (["--model.max-pixels", "512"], "max_pixels counts pixels, 784 a token: 512"),
        (["--model.lora-r", "1000000000"], "model.lora_r: .* less than or equal to 65536"),
        (["--rollout.group-size", "100000"], "rollout.group_size: .* less than or equal to 65536"),
        (["--seed", str(2**70)], "seed: .* less than"),
        (["--threads", "100000"], "threads: .* less than or equal to 1024"),
        *(([flag, value], "String should match pattern") for flag, value in (
            ("--device", "junk"), ("--device", "cuda:x"), ("--name", "../../x"), ("--name", "/x"), ("--name", ".."),
            ("--name", "a/b"))),
        *(([flag, "0"], "greater than or equal to 1") for flag in (
            "--save-every", "--sft.micro-batch", "--grpo.micro-batch", "--eval.batch-size", "--grpo.num-iterations")),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_errors(flags, message):
    with pytest.raises(SystemExit, match=message):
        parse(argv=flags)


def test_every_number_says_its_range():
    """Whatever field is added: an int or a float without a range is an oversight."""
    def numbers(kind, where=""):
        for f in dataclasses.fields(kind):
            if dataclasses.is_dataclass(f.type):
                yield from numbers(f.type, f"{where}{f.name}.")
            elif f.type in (int, float):
                yield where + f.name

    assert list(numbers(Config)) == []


def test_a_recorded_config_of_another_version_is_read(tmp_path):
    values = to_dict(parse(argv=["--seed", "7"])) | {"gone": 1, "lost": {"a": 1}}
    values["grpo"] |= {"old": 2, "lr": 0.5}
    del values["rollout"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    cfg, ignored = from_recorded(tmp_path / "config.json", Config())
    assert (cfg.seed, cfg.grpo.lr, cfg.rollout) == (7, 0.5, Config().rollout)
    assert ignored == ["grpo.old", "gone", "lost.a"]
    for text, message in (("[1]", "not a JSON object"), ("{", "Expecting"), ('{"seed": "x"}', "seed: Input should be")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            from_recorded(tmp_path / "config.json", Config())


def test_the_shipped_configs_parse():
    for path in sorted((ROOT / "configs").glob("*.toml")):
        assert isinstance(parse(argv=["--config", str(path)]), Config)


def test_a_dumped_config_reads_back():
    cfg = parse(argv=["--seed", "7", "--rewards.rank", "literal"])
    assert merge(Config(), flatten(to_dict(cfg))) == cfg
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}


def test_every_field_says_where_it_comes_from():
    """--help shows the comment behind a field or above it; each ends with its source in brackets."""
    for file in ("config.py", "phantom/config.py"):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        fields = [i for i, line in enumerate(lines) if re.match(r"    \w+: .* = ", line) and "field(" not in line]
        assert len(fields) > 20
        for i in fields:
            said = lines[i] if "  # " in lines[i] else lines[i - 1]
            assert re.search(r"# .*\]$", said), f"{file}: {lines[i]}"


def test_help_explains_the_fields():
    out = subprocess.run([sys.executable, "-c", "from config import parse; parse()", "--help"], cwd=ROOT,
                         capture_output=True, text=True).stdout  # fmt: skip
    assert "--grpo.lr" in out and "--config FILE.toml" in out and "DeepSeekMath" in out


def test_python_without_docstrings_is_one_line():
    done = subprocess.run([sys.executable, "-OO", "-c", "import config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "start without them" in done.stderr and done.stderr.count("\n") == 1


def test_run_has_a_name_that_torchrun_leaves_alone():
    """torchrun reads `--run` as its own --run-path, even behind the script's name."""
    assert parse(Config, argv=["--run-dir", "runs/x"]).run == parse(Config, argv=["--run", "runs/x"]).run == "runs/x"


@pytest.mark.parametrize("argv", [["--config"], ["--config", "configs"], ["--config", "nowhere.toml"]])
def test_a_config_that_is_no_file_is_one_line(argv):
    with pytest.raises(SystemExit, match="^config: "):
        parse(Config, argv=argv)


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "c.toml")
    with pytest.raises(ValueError, match="c.toml: not a regular file"):
        load_toml(str(tmp_path / "c.toml"), Config())
    with pytest.raises(ValueError, match="c.toml: not a regular file"):
        from_recorded(tmp_path / "c.toml", Config())
    with pytest.raises(SystemExit, match="run is empty"):
        parse(argv=["--run", ""])
