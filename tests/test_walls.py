"""The house's walls, read from the syntax trees: who may import whom, and how large a thing may be."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("vlm", "scorers", "formats", "phantom", "tiny", "evidence", "running")
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


@cache
def imports(name: str) -> frozenset[str]:
    """The modules that a module of ours names in its import statements, wherever they stand; `a.b` also as `a`."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= full or {node.module}
    return frozenset(found)


def ours(name: str) -> set[str]:
    return set(imports(name) & MODULES.keys()) - {name}


def reach(name: str) -> set[str]:
    """Modules of ours that importing `name` loads, itself among them."""
    seen, todo = set(), {name}
    while todo:
        seen |= todo
        todo = {other for one in todo for other in ours(one)} - seen
    return seen


def third_parties(name: str) -> set[str]:
    """Top-level names of everything else that importing `name` may load from its own and our other files."""
    named = {other.split(".")[0] for module in reach(name) for other in imports(module)}
    return named - {module.split(".")[0] for module in MODULES}


def test_no_import_circle():
    circles = [name for name in MODULES if any(name in reach(other) for other in ours(name))]
    assert circles == []


def test_the_loss_imports_torch_alone():
    for name in {"grpo", "dpo"} & MODULES.keys():
        assert {other.split(".")[0] for other in imports(name)} == {"torch"}


def test_no_room_imports_a_script():
    for name in MODULES:
        assert "." not in name or not ours(name) & {"train", "evaluate"}, name


def test_the_judge_imports_nothing_of_ours():
    assert ours("evidence.reader") == set()


def test_the_config_pulls_in_no_imaging_library_and_no_torch():
    known = {"dataclasses", "functools", "json", "pathlib", "pydantic", "sys", "tomllib", "typing", "tyro"}
    assert third_parties("config") <= known


def test_the_rewards_load_no_model():
    assert not any(name.startswith("scorers") for name in reach("rewards"))
    assert not third_parties("rewards") & {"transformers", "peft", "open_clip", "bert_score", "radgraph", "f1chexbert"}


def test_each_room_has_a_sign_of_one_sentence():
    for room in ROOMS:
        tree = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1 and ast.get_docstring(tree).count(". ") == 0, room


def test_the_root_holds_the_method_and_nothing_else():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files <= {"train", "evaluate", "model", "rollout", "rewards", "grpo", "sft", "dpo", "data", "config"}
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in MODULES.items()}
    assert sum(lines[name] for name in files) <= 1800 and sum(lines.values()) <= 10200  # the README's recipe fits in
    assert {name: n for name, n in lines.items() if n > 320} == {}
    template = (ROOT / "evidence" / "page.html.jinja").read_text(encoding="utf-8")
    assert lines["evidence.page"] + template.count("\n") <= 350


def test_a_function_fits_one_screen():
    long = [f"{name}.{node.name}" for name, path in MODULES.items() for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 42]  # fmt: skip
    assert long == []
