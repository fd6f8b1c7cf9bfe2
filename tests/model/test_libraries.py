"""No module of model/ replaces an attribute of a library's module or class: that would change it for the whole process."""

import ast
from collections.abc import Iterator

import pytest

from benchmarks import structure
from tests.model.libraries import relied_on


def replaced_attributes(source: str) -> Iterator[str]:
    """`line: target` of each attribute that is set, deleted or set by setattr on a name imported from a library."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in structure.FOLDERS:
            imported |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            target: ast.expr = node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            target = node.args[0]
        else:
            continue
        root = target
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if isinstance(root, ast.Name) and root.id in imported:
            yield f"{node.lineno}: {ast.unparse(target)}"


def test_no_attribute_of_a_library_is_replaced():
    replaced = {
        path: list(replaced_attributes(text)) for path, text in structure.modules(structure.ROOT) if path.startswith("model/")
    }
    assert len(replaced) > 40 and not {path: places for path, places in replaced.items() if places}


@pytest.mark.parametrize(
    "line",
    [
        "torch.compile = None",
        "torch.backends.cudnn.enabled = False",
        "Linear.forward = print",
        "setattr(Linear, 'forward', print)",
        "del np.load",
    ],
)
def test_a_replaced_attribute_is_seen(line: str):
    source = f"import torch\nimport numpy as np\nfrom torch.nn import Linear\nfrom model.head import Head\nHead.x = 1\n{line}\n"
    assert len(list(replaced_attributes(source))) == 1


def test_the_sentence_names_library_version_interface_and_use():
    with pytest.raises(pytest.fail.Exception) as caught, relied_on("torch", "torch.mark", "model.x marks"):
        raise AttributeError("no mark\nand a second line")
    sentence = str(caught.value)
    assert sentence.startswith("torch 2") and "\n" not in sentence
    assert "torch.mark no longer does what tiglon relies on (model.x marks): AttributeError no mark; adapt" in sentence
