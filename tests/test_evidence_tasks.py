"""The runner of the commands of demo and sweep: order, processes, and the end when one fails or all are told to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import Config, load_toml
from evidence import demo, tasks
from evidence.tasks import CORES, Task, run_tasks

ROOT = Path(demo.__file__).parents[1]


@pytest.fixture(autouse=True)
def step(tmp_path, monkeypatch):
    """A script `step` whose `main` runs the code in its one flag."""
    monkeypatch.setattr(tasks, "IMPORTED", [])  # ten seconds, and not needed here
    monkeypatch.syspath_prepend(tmp_path / "scripts")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "step.py").write_text("import sys\n\n\ndef main():\n    exec(sys.argv[1])\n")


def task(tmp_path, name, *after, code=None, **fields):
    made, order = str(tmp_path / name), str(tmp_path / "order")
    code = code or f"open({made!r}, 'w').write('x'); open({order!r}, 'a').write({name!r})"
    return Task(name, "step.py", [code], 1.0, list(after), [tmp_path / name], tmp_path / f"{name}.txt", **fields)


def test_tasks_run_after_what_they_need_and_once(tmp_path, capsys):
    a = task(tmp_path, "a")
    b = task(tmp_path, "b", a)
    c = task(tmp_path, "c", b)
    d = task(tmp_path, "d", a, c)
    run_tasks([c, b, a, d])
    order = (tmp_path / "order").read_text()
    assert order == "abcd" and capsys.readouterr().out.count("to go") == 4
    (tmp_path / "d").unlink()
    run_tasks([c, b, a, d])  # goes on: only what is missing is made
    assert (tmp_path / "order").read_text() == "abcdd"


def test_a_task_that_makes_several_files_is_done_when_all_are_there(tmp_path):
    both = Task("both", "step", [], 1.0, makes=[tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b").touch()
    assert not both.made()
    (tmp_path / "a").touch()
    assert both.made() and not Task("always", "step", [], 1.0).made()


def test_tasks_that_take_all_cores_run_alone(tmp_path):
    watch = (
        "import os, pathlib, time; here = pathlib.Path({here!r}); (here / {name!r}).write_text(''); time.sleep(0.5); "
        "seen = [path.name for path in here.glob('busy*')]; (here / 'seen').open('a').write(' '.join(seen) + chr(10)); "
        "(here / {name!r}).unlink(missing_ok=True)"
    )

    def busy(name, cores):
        code = watch.format(here=str(tmp_path), name=name)
        return Task(name, "step", [code], 1.0, cores=cores)

    run_tasks([busy("busy1", 1), busy("busy2", CORES), busy("busy3", 1)])
    assert "busy2" in (seen := (tmp_path / "seen").read_text().splitlines()) and len(seen) == 2 + CORES


@pytest.mark.parametrize(
    ("code", "message"),
    [("raise SystemExit('no luck')", "(?s)bad failed .exit code 1.*no luck"), ("pass", "its results are not there")],
)
def test_a_failing_task_stops_all_with_its_last_words(tmp_path, code, message):
    late, slow = tmp_path / "late", task(tmp_path, "slow", code="import time; time.sleep(60)")
    bad = task(tmp_path, "bad", code=code)
    began = time.time()
    with pytest.raises(SystemExit, match=message):
        run_tasks([slow, bad, task(tmp_path, "late", bad)])
    assert not late.exists() and slow.ended() and time.time() - began < 30


def test_a_check_may_stop_what_comes_after(tmp_path):
    def check():
        sys.exit("below the gate")

    a = task(tmp_path, "a", check=check)
    with pytest.raises(SystemExit, match="below the gate"):
        run_tasks([a, task(tmp_path, "b", a)])
    assert not (tmp_path / "b").exists()


def test_sigterm_ends_the_children(tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path / 'scripts')!r}]; "
            "from evidence import tasks as t; t.IMPORTED.clear(); "
            f"t.run_tasks([t.Task('a', 'step', [{child!r}], 1)])")  # fmt: skip
    runner, pid = subprocess.Popen([sys.executable, "-c", code]), tmp_path / "pid"
    deadline = time.time() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.time() < deadline
        time.sleep(0.1)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(timeout=30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_processes_of_one_task_are_a_group_as_torchrun_would_start_it(tmp_path):
    code = (f"import os; from running import parallel; parallel.start('cpu', 1); every = parallel.gather(os.getpid()); "
            f"parallel.rank() or open({str(tmp_path / 'both')!r}, 'w').write(str(len(set(every))))")  # fmt: skip
    run_tasks([task(tmp_path, "both", code=code, cores=2)])
    assert (tmp_path / "both").read_text() == "2"


def test_a_task_of_two_processes_ends_when_one_fails(tmp_path):
    code = "import os, time; os.environ['RANK'] == '1' and exit('my disk is full'); time.sleep(60)"
    began = time.time()
    with pytest.raises(SystemExit, match="(?s)torchrun --nproc-per-node 2 step.py|my disk is full"):
        run_tasks([task(tmp_path, "both", code=code, cores=2)])
    assert time.time() - began < 50


def test_the_demo_trains_from_scratch_to_tables(monkeypatch):
    every = {task.title: task for task in demo.make_tasks(Config(), ["--seed", "7"])}
    branch, stage1 = ["--stage", "2", "--seed", "7"], every["Stage 1: text rewards"]
    assert every["visual reward mixed in"].flags == branch
    assert every["text rewards go on"].flags == [*branch, "--rewards.lambda-vis", "0", "--name", "stage1_continued"]
    assert (stage1.script, stage1.flags, stage1.cores) == ("train.py", ["--stage", "1", "--seed", "7"], 2)
    assert [task.title for task in every["visual reward mixed in"].after] == ["Stage 1: text rewards"]
    assert {task.title for task in stage1.after} == {"its gate: does it see?", "assets: expert"}
    last = [title for title in every if title.startswith("evaluation")]
    assert all(len(every[title].after) == 2 for title in last) and len(last) == 2


def test_iu_xray_is_the_demo_with_models_of_its_own():
    cfg = load_toml(str(ROOT / "configs" / "iu_xray_tiny.toml"), Config())
    every = {task.title: task for task in demo.make_tasks(cfg, [])}
    builds = [title for title, task in every.items() if task.script == "phantom.assets"]
    assert [every[title].flags[1] for title in builds] == ["tiny:labeller", "tiny:base", "tiny:expert"]
    assert not any(every[title].after for title in builds)
    assert [t.title for t in every["Stage 0 (SFT)"].after] == ["assets: tiny:base"]
    assert {t.title for t in every["Stage 1: text rewards"].after} == {"its gate: does it see?", "assets: tiny:expert"}
    phantom = [task.script for task in demo.make_tasks(Config(), [])]
    assert [task.script for task in every.values()] == phantom[1:]  # but for the data set, the same commands


def test_the_gate_stops_a_policy_that_does_not_look(tmp_path):
    cfg = Config(run=str(tmp_path))
    results = tmp_path / "eval" / "val" / "sft" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text('{"greedy": {"sided_f1": {"value": 0.5}}}')
    with pytest.raises(SystemExit, match="50.0 .gate 57.*too low"):
        demo.check_gate(cfg)
    results.write_text('{"greedy": {"sided_f1": {"value": 0.6}}}')
    demo.check_gate(cfg)
