"""The laws of the house, read off the source."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from launch.config import RunConfig, load
from launch.reference import page

ROOT = Path(__file__).parent.parent
ROOMS = ("model", "data", "trainer", "launch")
MAY_IMPORT = {
    "model": {"model"},
    "data": {"data"},
    "trainer": {"trainer", "model"},
    "launch": {"launch", "trainer", "model", "data"},
    "benchmarks": {"benchmarks", "tests", "launch", "trainer", "model", "data"},
}
DOORS = {"megatron": {"model/megatron.py"}, "deepspeed": {"trainer/zero.py"}}
OPENED_LATE = {"model/parallel.py": {"model.megatron"}}
"""Doors to libraries that take seconds to import, opened where they are wanted (launch/cli.py does so by name)."""
NO_ROOMS = {"utils", "util", "common", "core", "helpers", "helper", "misc"}


def sources(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
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
            if top in (*ROOMS, "tests", "benchmarks") and top not in allowed:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong


def test_there_is_no_circle():
    edges = {
        path[:-3].replace("/", "."): {name for _, name in imports(tree) if name.split(".")[0] in ROOMS}
        for path, tree in sources(*ROOMS)
    }

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        for below in edges.pop(name, set()):
            visit(below, (*above, name))

    for name in list(edges):
        visit(name, ())


def test_our_own_modules_are_imported_at_the_top_but_for_slow_doors():
    wrong = []
    for path, tree in sources(*ROOMS):
        for node in ast.walk(tree):
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or guarded:
                late = OPENED_LATE.get(path, set())
                wrong += [
                    f"{path}:{line} {name}"
                    for line, name in imports(node)
                    if name.split(".")[0] in {*ROOMS} and name not in late
                ]
    assert not wrong


def test_foreign_libraries_enter_by_one_door():
    wrong = []
    for path, tree in sources(*ROOMS):
        for line, name in imports(tree):
            doors = DOORS.get(name.split(".")[0])
            if doors is not None and path not in doors:
                wrong.append(f"{path}:{line} imports {name}")
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
            if reads and path not in ("launch/runtime.py", "launch/program.py"):  # the second speaks before torch is there
                wrong.append(f"{path}:{node.lineno} reads the environment")
    assert not wrong


def test_data_knows_no_process_groups():
    for path, tree in sources("data"):
        assert not any(name.startswith("torch.distributed") for _, name in imports(tree)), path


def test_no_room_is_a_lumber_room():
    names = {part.removesuffix(".py") for path, _ in sources(*ROOMS) for part in path.split("/")}
    assert not names & NO_ROOMS


def test_tests_mirror_the_tree():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


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
    assert load(path).model_dump() and tomllib.loads(path.read_text())


def test_the_readme_tree_is_the_tree_on_disk():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^\s*([a-z_]+/)\s", text, re.MULTILINE))
    assert {"trainer/", "model/", "data/", "launch/", "tests/", "benchmarks/", "docs/"} <= named
    assert not [name for name in named if not (ROOT / name).is_dir()]


def test_the_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"pretrain", "test"} <= set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
    for path in re.findall(
        r"(?<![\w/.])((?:launch|benchmarks|docs|tests|trainer|model|data)/[\w./-]+\.(?:py|toml|md|sh))", text
    ):
        assert (ROOT / path).exists(), path


def test_the_configuration_page_is_made_from_the_source():
    assert (ROOT / "docs/configuration.md").read_text() == page(), "run: python -m launch.reference > docs/configuration.md"
