"""The laws of CONTRIBUTING.md, read off the source."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from benchmarks import structure
from launch import cli
from launch.config import RunConfig
from launch.config_reference import reference_page
from launch.load_config import load_config

ROOT = structure.ROOT
FOLDERS = structure.FOLDERS
MAY_IMPORT = {
    "model": {"model"},
    "data": {"data"},
    "trainer": {"trainer", "model"},
    "launch": {"launch", "trainer", "model", "data"},
    "benchmarks": {"benchmarks", "tests", "launch", "trainer", "model", "data"},
}
LEVELS = {
    "model": [
        {"generate", "huggingface", "diagnostics", "activations", "flops", "sizes", "initialization"},
        {"decoder"}, {"block", "head"}, {"config"}, {"attention", "feed_forward", "loss"}, {"attention.kernels"},
        {"positions"}, {"attention.heads"}, {"sublayer"}, {"parallel"}, {"parameters"}, {"positions.config"},
        {"positions.maps"}, {"recompute"},
    ],
    "trainer": [
        {"loop"}, {"session"}, {"evaluate", "engines"}, {"optimizers", "checkpoint", "monitoring", "schedule"},
        {"state", "config", "lost_rank", "printable", "private_api"},
    ],
    "data": [{"ingest", "corpus"}, {"tokenizer"}, {"text"}, {"storage", "config"}],
}  # fmt: skip
"""Inside a folder a module or package imports its own level and those after it."""
LIBRARY_MODULES = {"megatron": {"model/parallel/tensor.py"}, "deepspeed": {"trainer/engines/deepspeed_internals.py"}}
IMPORTED_LATE = {
    "model/parallel/mesh.py": {"model.parallel.tensor"},  # Megatron-Core
    "launch/commands/init.py": {"launch.complete_file"},  # torch
}
"""What takes seconds to import, imported where it is wanted (launch/cli.py does so by name)."""
NO_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "misc"}


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


def test_imports_run_downstairs():
    wrong = []
    for path, tree in sources(*MAY_IMPORT):
        allowed = MAY_IMPORT[path.split("/")[0]]
        for line, name in imports(tree):
            top = name.split(".")[0]
            if top in (*FOLDERS, "tests", "benchmarks") and top not in allowed:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong


def test_there_is_no_circle():
    edges = {
        path[:-3].replace("/", "."): {name for _, name in imports(tree) if name.split(".")[0] in FOLDERS}
        for path, tree in sources(*FOLDERS)
    }

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        for below in edges.pop(name, set()):
            visit(below, (*above, name))

    for name in list(edges):
        visit(name, ())


def test_our_own_modules_are_imported_at_the_top_but_for_slow_libraries():
    wrong = []
    for path, tree in sources(*FOLDERS):
        for node in ast.walk(tree):
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or guarded:
                late = IMPORTED_LATE.get(path, set())
                wrong += [
                    f"{path}:{line} {name}"
                    for line, name in imports(node)
                    if name.split(".")[0] in {*FOLDERS} and name not in late
                ]
    assert not wrong


def test_a_foreign_library_is_imported_by_one_module():
    wrong = []
    for path, tree in sources(*FOLDERS):
        for line, name in imports(tree):
            modules = LIBRARY_MODULES.get(name.split(".")[0])
            if modules is not None and path not in modules:
                wrong.append(f"{path}:{line} imports {name}")
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
            if reads and path not in ("launch/runtime.py", "launch/interrupts.py"):  # the second is there before torch is
                wrong.append(f"{path}:{node.lineno} reads the environment")
    assert not wrong


EXECUTING = re.compile(
    r"(pickle|cPickle|dill|joblib|shelve|marshal|yaml|cloudpickle)(\.\w+)*|(\w+\.)*(Unpickler|run_path|run_module|unsafe_load)"
    r"|torch\.load|torch\.hub\.load|torch\.package\.\w+|eval|exec|compile|__import__|os\.system|os\.popen"
)
"""Calls that run, or may run, what a file holds."""


def executing_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        name = ast.unparse(node.func)
        weights = name == "torch.load" and keywords.get("weights_only") == "True"
        remote = keywords.get("allow_pickle", "False") != "False" or keywords.get("trust_remote_code", "False") != "False"
        if (EXECUTING.fullmatch(name) and not weights) or remote or keywords.get("shell", "False") != "False":
            yield node.lineno, ast.unparse(node)


def test_nothing_that_a_file_holds_is_executed():
    wrong = [f"{path}:{line} {call}" for path, tree in sources(*FOLDERS) for line, call in executing_calls(tree)]
    wrong += [f"tiglon.py:{line} {call}" for line, call in executing_calls(ast.parse((ROOT / "tiglon.py").read_text()))]
    for path, tree in sources(*FOLDERS):
        wrong += [f"{path}:{line} {name}" for line, name in imports(tree) if EXECUTING.fullmatch(name)]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.loads(x)", "np.load(path, allow_pickle=True)",
        "yaml.load(x)", "eval(x)", "exec(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)", "os.system(x)", "runpy.run_path(x)",
    ],
)  # fmt: skip
def test_the_search_sees_what_executes(line: str):
    assert list(executing_calls(ast.parse(line))) == [(1, ast.unparse(ast.parse(line)))]
    harmless = "torch.load(x, weights_only=True); np.load(x); re.compile(x); torch.compile(x); tomllib.loads(x); json.loads(x)"
    assert not list(executing_calls(ast.parse(harmless)))


def test_data_knows_no_process_groups():
    for path, tree in sources("data"):
        assert not any(name.startswith("torch.distributed") for _, name in imports(tree)), path


def test_no_module_is_called_by_a_name_that_says_nothing():
    names = {part.removesuffix(".py") for path, _ in sources(*FOLDERS) for part in path.split("/")}
    assert not names & NO_NAMES


@pytest.mark.parametrize("what", structure.COUNTS)
def test_the_source_has_none_of(what: str):
    """`python -m benchmarks.structure --list WHAT` says where."""
    title, places = structure.COUNTS[what]
    assert not (found := places(ROOT)), f"{len(found)} {title}: {found[:20]}"


def test_the_counts_see_what_they_count(tmp_path: Path):
    """Planted: one of each."""
    (tmp_path / "model").mkdir()
    (tmp_path / "docs").mkdir()
    many = ", ".join(f"a{number}" for number in range(structure.MAX_ARGUMENTS + 1))
    long = "\n".join(["    pass"] * structure.MAX_LINES)
    (tmp_path / "model/a.py").write_text(f"def same():\n{long}\n")
    (tmp_path / "model/b.py").write_text(f"def same({many}):\n    'Bytes a token in the engine room.'\n")
    for page in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / page).write_text("It carries on.\n")
    found = {what: count(tmp_path) for what, (_, count) in structure.COUNTS.items()}
    assert found["names"] == ["same: model/a.py, model/b.py"] and found["tests"] == ["model/a.py", "model/b.py"]
    assert found["long"] == [f"model/a.py:1 same: {structure.MAX_LINES + 1} lines"]
    assert found["arguments"] == [f"model/b.py:1 same: {structure.MAX_ARGUMENTS + 1} arguments"]
    assert len(found["words"]) == 4 and "model/b.py:2 'Bytes a token'" in found["words"]


def level(folder: str, name: str) -> int:
    """The level of a module, by the longest prefix that stands in LEVELS."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        for number, names in enumerate(LEVELS[folder]):
            if ".".join(parts[:end]) in names:
                return number
    raise AssertionError(f"{name} has no level: add it to LEVELS")


def test_inside_a_folder_imports_run_one_way():
    wrong = []
    for folder in LEVELS:
        for path, tree in sources(folder):
            own = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            late = IMPORTED_LATE.get(path, set())
            below = [name for _, name in imports(tree) if name.startswith(f"{folder}.") and name not in late]
            wrong += [f"{path} imports {name}" for name in below if level(folder, name) < level(folder, own)]
    assert not wrong


def test_the_training_loop_fits_on_a_screen():
    tree = ast.parse((ROOT / "trainer/loop.py").read_text())
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 48


def sections(model: type[BaseModel], name: str = "") -> Iterator[tuple[str, str | None]]:
    for key, field in model.model_fields.items():
        yield f"{name}{key}", field.description
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind, f"{name}{key}.")


def test_every_field_is_described_and_every_section_closed():
    assert not [name for name, description in sections(RunConfig) if not description]
    for field in RunConfig.model_fields.values():
        settings = field.annotation.model_config  # type: ignore[union-attr]
        assert settings.get("extra") == "forbid" and settings.get("frozen")


@pytest.mark.parametrize("path", sorted((ROOT / "launch/configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path):
    assert load_config(path).model_dump() and tomllib.loads(path.read_text())


def test_the_readme_tree_is_the_tree_on_disk():
    text = (ROOT / "README.md").read_text()
    top, named = "", set()
    for indent, name in re.findall(r"^    ( *)([a-z_/]+)/\s", text, re.MULTILINE):
        top, path = ("", name) if not indent else (top, f"{top}/{name}")
        top = top or name
        named.add(path)
    packages = {path.parent.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    assert named == {*packages, "tests", "benchmarks", "docs", "launch/configs"}


def test_the_readme_links_every_page():
    text = (ROOT / "README.md").read_text()
    pages = {path.relative_to(ROOT).as_posix() for path in (*(ROOT / "docs").glob("*.md"), *ROOT.glob("C*.md"))}
    assert not [page for page in pages if f"({page})" not in text]
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert not [link for link in linked if not (ROOT / link).exists()]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_the_commands_of_a_page_exist(page: str):
    known = set(cli.COMMANDS)
    named = re.findall(r"^    (?:\$ )?tiglon ([a-z]+)|`tiglon ([a-z]+)[ `]", (ROOT / page).read_text(), re.MULTILINE)
    assert not {one or other for one, other in named} - known


def test_the_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"pretrain", "test"} <= set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
    for path in re.findall(
        r"(?<![\w/.])((?:launch|benchmarks|docs|tests|trainer|model|data)/[\w./-]+\.(?:py|toml|md|sh))", text
    ):
        assert "FOLDER" in path or (ROOT / path).exists(), path


def test_the_configuration_page_is_made_from_the_source():
    assert (ROOT / "docs/configuration.md").read_text() == reference_page(), (
        "run: python -m launch.config_reference > docs/configuration.md"
    )
