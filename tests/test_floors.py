"""A file imports only from below: read from the sources, lazy imports included. And files stay short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvik.models.families import FAMILIES
from kvik.models.files.wheels import BUILT_IN
from kvik.models.shapes.families import FAMILIES as SIZED

SOURCE = Path(__file__).parent.parent / "src" / "kvik"
FLOORS = (
    {"errors", "events", "lazy", "units"},
    {"ops"},
    {"cache"},
    {"models"},
    {"engine"},
    {"plan", "trace", "bench", "hf", "eval", "fuzz", "train"},
    {"server", "chat", "cli"},
)
ROOMS = ("text", "shapes", "operators", "families", "files", "model")  # of models: each knows none behind it
EXEMPT = {"__init__", "__main__"}  # they name what they offer; everything behind it is loaded when it is used
FILES = sorted(SOURCE.rglob("*.py"))


def floor(module):
    """The number of a module's floor, from its dotted name below kvik; None for what has none."""
    top = module.split(".")[0]
    if top in EXEMPT:
        return None
    return next(number for number, names in enumerate(FLOORS) if top in names)


def imported(tree):
    """Names below kvik that a file imports anywhere, except for type checking: `errors`, `cache.spec`."""
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for child in ast.walk(part)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out: from kvik.cache import …"
            names = [node.module]
            if node.module in ("kvik", "kvik.models"):
                names = [f"{node.module}.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        else:
            continue
        yield from (name.removeprefix("kvik.") for name in names if name.startswith("kvik."))


def check_floor(module, tree):
    mine = floor(module)
    for name in imported(tree):
        if mine is not None:
            assert floor(name) is not None, f"{module} imports {name}"
            assert floor(name) <= mine, f"{module} imports {name}, from a floor above"


@pytest.mark.parametrize("number", range(len(ROOMS)))
def test_a_room_of_models_knows_none_behind_it(number):
    behind = {f"models.{room}" for room in ROOMS[number + 1 :]}
    for path in sorted((SOURCE / "models" / ROOMS[number]).rglob("*.py")):
        for name in imported(ast.parse(path.read_text())):
            assert ".".join(name.split(".")[:2]) not in behind, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_from_below(path):
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    check_floor(module, ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "code",
    [
        "from kvik.cache.cache import Cache",
        "import kvik.engine.generation",
        "from kvik import cli",
        "def f():\n    from kvik.models.model import load",
        "try:\n    import kvik.plan\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_from_above_is_seen(code):
    with pytest.raises(AssertionError, match="from a floor above"):
        check_floor("ops.codecs", ast.parse(code))


def test_what_is_for_type_checking_only_is_no_import():
    check_floor("ops.codecs", ast.parse("if TYPE_CHECKING:\n    from kvik.cache.cache import Cache"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def modules_after(*code):
    """What a fresh process has loaded after some code."""
    program = "\n".join([*code, "import sys", "print('\\n'.join(sys.modules), file=sys.stderr)"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        ["import kvik"],
        ["import kvik.plan"],
        ["import kvik.hf"],
        [
            "import sys",
            "sys.argv = ['kvik', '--help']",
            "from kvik.cli import main",
            "try: main()",
            "except SystemExit: pass",
        ],
    ],
    ids=["import kvik", "import kvik.plan", "import kvik.hf", "kvik --help"],
)
def test_torch_is_not_loaded_on_the_way_to(code):
    loaded = modules_after(*code)
    assert "kvik" in loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "jinja2", "huggingface_hub"}


def test_torch_would_be_seen():
    assert "torch" in modules_after("import kvik", "kvik.Cache")


def family_names():
    """What config.json and GGUF files call the families that kvik runs or sizes."""
    sized = {name for name in SIZED if name != "plain"}
    return sized | {name for family in FAMILIES for name in (family.config.family, *family.kinds, *family.archs)}


def named(tree, names):
    """Families that a file's names or texts mention, its documentation aside."""
    documented = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented:
            words = re.findall(r"[a-z][a-z0-9]*", re.sub("|".join(map(re.escape, BUILT_IN)), "", node.value.lower()))
        else:
            words = re.findall(r"[a-z][a-z0-9]*", str(getattr(node, "id", getattr(node, "attr", ""))).lower())
        yield from names & set(words)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_outside_models_names_a_family(path):
    top = path.relative_to(SOURCE).parts[0]
    if top not in ("models", "train"):  # what is trained must be of some family
        assert not set(named(ast.parse(path.read_text()), family_names()))


def test_a_family_is_noticed_in_names_and_texts_but_not_in_documentation():
    names = family_names()
    assert {"llama", "t5", "gpt2", "whisper", "bert", "deepseek_v3"} & names
    for text in ("if kind == 'llama':\n    pass", "from x import y\nllama(y)", "x.llama = f'{x} of t5'"):
        assert set(named(ast.parse(text), names))
    assert not set(named(ast.parse("'''As in Llama.'''\ndef f():\n    '''T5's.'''"), names))
