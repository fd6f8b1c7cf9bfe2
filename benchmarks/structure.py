"""How the source is built, in counts: lines, functions, names, tests, words. tests/test_structure.py demands the zeros.

python -m benchmarks.structure                    # the working tree
python -m benchmarks.structure --at 8f9b0ee       # a commit beside it
python -m benchmarks.structure --list words       # each place of one count
"""

import argparse
import ast
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "trainer", "data", "launch")
MAX_LINES = 40
MAX_ARGUMENTS = 7

ONE_MEANING = {
    "forward": "an attention backend's forward pass, one per backend",
    "backward": "an attention backend's backward pass, one per backend",
    "main": "what a program runs",
    "train": "the training loop, and the function of the Python interface that runs it",
}
"""Names that several modules define because they are one interface."""

UNIT = (
    r"(?:tokens?|bytes?|numbers?|elements?|operations?|times|once|twice|nats?|seconds?|records?|lines?|files?|rows?|points?|values?|"
    r"characters?|graphs?|messages?|batches|samples?|steps?|[kMGT]i?B|FLOPs?|vectors?|fragments?|tensors?|%|process(?:es)?|"
    r"cop(?:y|ies)|loss(?:es)?|gradients?|sums?|calls?|launches|checksums?|updates?|one|two|three|four|\d+)"
)
PER = (
    r"(?:token|rank|update|second|minute|hour|layer|parameter|element|weight|micro-batch|document|seed|GPU|device|node|key|"
    r"query|head|block|number|character|tensor|record|sequence)"
)
WORDS = {
    "per token, per rank, per update": rf"\b{UNIT}\s+an?\s+{PER}\b",
    "elements, not numbers": (
        r"\b(?:flat numbers|numbers (?:a|per|of a) (?:token|tensor|slice|row)|\w*row_numbers\w*|bytes_per_number)\b"
    ),
    "layout or structure, not house": r"\bhouses?\b",
    "module or package, not room": r"\b(?:rooms|(?:the|data|a|own|lumber|engine) room)\b",
    "interface, not door or face": r"\b(?:doors?|on one face)\b",
    "rotate, not turn": r"\b(?:turn(?:s|ed)? (?:plainly|otherwise|more often)|never turn once)\b",
    "evaluate with, not read with": r"\breads? with\b",
    "recompute, not form again": r"\b(?:form(?:s|ed)? (?:\w+ )*again|dear to make)\b",
    "output of libraries, not chatter": r"\bchatter\b",
    "resume, not go on or carry on": r"\b(?:go|goes|went|gone|going|carry|carries|carried|carrying) on\b",
    "unhealthy or failing, not ill": r"\b(?:ill|sick)\b",
    "fix, not mend": r"\bmend(?:s|ed|ing)?\b",
    "has not responded, not no sign of life": r"\bsigns? of life\b",
    "lock, not lease": r"\bleases?\b",
    "citations by title and address": r"\bkexue \d{4,5}\b",
}
"""What an engineer of the field says, and the pattern of what is said instead."""


def modules(root: Path) -> Iterator[tuple[str, str]]:
    """Path and text of every module of the source, sorted in each folder."""
    for path in (*sorted(root.glob("*.py")), *(path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")))):
        yield path.relative_to(root).as_posix(), path.read_text()


def source_lines(root: Path) -> int:
    """Lines of Python and C++ of the source."""
    files = [path for folder in FOLDERS for end in ("py", "cpp") for path in (root / folder).rglob(f"*.{end}")]
    return sum(len(path.read_text().splitlines()) for path in (*root.glob("*.py"), *files))


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method, with "path:line name"."""
    for path, text in modules(root):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.lineno} {node.name}", node


def long_functions(root: Path) -> list[str]:
    """Functions of more than MAX_LINES lines, from `def` to their end."""
    sizes = ((place, (node.end_lineno or 0) - node.lineno + 1) for place, node in functions(root))
    return [f"{place}: {lines} lines" for place, lines in sizes if lines > MAX_LINES]


def many_arguments(root: Path) -> list[str]:
    """Functions of more than MAX_ARGUMENTS arguments, `self` not counted.

    Two kinds are left out, since their arguments are not ours to group: custom operators (torch takes tensors and numbers one
    by one) with what is registered for them, and commands (typer makes an option of every argument).
    """
    found = []
    for place, node in functions(root):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(arguments) - (bool(arguments) and arguments[0].arg in ("self", "cls"))
        if count > MAX_ARGUMENTS and not _is_operator(node) and not _is_command(node):
            found.append(f"{place}: {count} arguments")
    return found


def _is_operator(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("custom_op" in ast.unparse(d) or "register_fake" in ast.unparse(d) for d in node.decorator_list)


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("typer.Option" in ast.unparse(a.annotation) for a in node.args.args if a.annotation is not None)


def names_with_two_meanings(root: Path) -> list[str]:
    """Public classes, functions and constants that more than one module defines."""
    places: dict[str, set[str]] = defaultdict(set)
    for path, text in modules(root):
        for node in ast.parse(text).body:
            for name in _defined(node):
                places[name].add(path)
    return [
        f"{name}: {', '.join(sorted(paths))}"
        for name, paths in sorted(places.items())
        if len(paths) > 1 and not name.startswith("_") and name not in ONE_MEANING
    ]


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    found = [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in found if name not in ("log", "aten", "app")]  # a module's own handle on a library


def without_tests(root: Path) -> list[str]:
    """Modules for which no tests/<folder>/test_<module>.py stands."""
    found = []
    for path, text in modules(root):
        module = Path(path)
        empty = all(isinstance(node, ast.Expr) for node in ast.parse(text).body)
        name = module.parent.name if module.name == "__init__.py" else module.stem.strip("_")
        if not empty and not (root / "tests" / module.parent / f"test_{name}.py").is_file():
            found.append(path)
    return found


def words(root: Path) -> list[str]:
    """Places that say a thing in words which the field does not use."""
    pages = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "benchmarks").glob("*.md")]
    ends = ("*.py", "*.cpp", "*.patch")
    code = [path for folder in (*FOLDERS, "benchmarks", "tests") for end in ends for path in (root / folder).rglob(end)]
    own = {"benchmarks/structure.py", "tests/test_structure.py"}  # which spell them out
    found = []
    for path in sorted((*pages, *code, *root.glob("*.py"))):
        name = path.relative_to(root).as_posix()
        for number, line in enumerate(path.read_text().splitlines() if name not in own else [], 1):
            said = [match for pattern in WORDS.values() for match in re.findall(pattern, line, re.IGNORECASE)]
            found += [f"{name}:{number} {match!r}" for match in said]
    return found


COUNTS = {
    "names": ("public names with two meanings", names_with_two_meanings),
    "long": (f"functions over {MAX_LINES} lines", long_functions),
    "arguments": (f"functions with more than {MAX_ARGUMENTS} arguments", many_arguments),
    "tests": ("modules without a test file", without_tests),
    "words": ("words that the field does not use", words),
}


def table(root: Path) -> dict[str, int]:
    """Every count, by what is counted."""
    files = [path for path, _ in modules(root)]
    in_one_folder = max(sum(Path(path).parent.as_posix() == folder for path in files) for folder in FOLDERS)
    found = {"source lines": source_lines(root), "modules": len(files), "most modules beside one another": in_one_folder}
    return found | {title: len(count(root)) for title, count in COUNTS.values()}


def unpack(commit: str, folder: Path) -> None:
    """The tree of a commit of this repository. Raises ValueError for what names no commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise ValueError(f"'{commit}' names no commit of this repository; give one that `git log` shows")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def main() -> int:
    """Print a table, or the places of one count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--at", metavar="COMMIT", help="a commit to set beside the working tree")
    parser.add_argument("--list", choices=COUNTS, help="print each place of one count")
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(COUNTS[chosen.list][1](ROOT)))
        return 0
    columns = {"now": table(ROOT)}
    if chosen.at:
        with tempfile.TemporaryDirectory() as folder:
            try:
                unpack(chosen.at, Path(folder))
            except ValueError as error:
                parser.error(str(error))
            columns = {chosen.at: table(Path(folder)), **columns}
    print(f"{'':44}" + "".join(f"{name:>12}" for name in columns))
    for title in columns["now"]:
        print(f"{title:44}" + "".join(f"{counts[title]:>12,}" for counts in columns.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
