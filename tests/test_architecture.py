"""The house rules that a reader relies on: imports point one way, importing does nothing, no pickle is read.

The sources are read with `ast`, so a rule holds for imports inside functions as well; those under `TYPE_CHECKING`
exist for the type checker alone and do not count.
"""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer

import paligemma
from paligemma.cli import main as cli

ROOT = Path(paligemma.__file__).parent

# Bottom to top: a module or room may import what stands in its own line or above it.
LAYERS = [
    # the leaves: each can be read alone
    "configuration attention_mask kv_cache static_kv_cache modeling_siglip images tokenizer processing_paligemma "
    "devices files terminal allocator arguments tasks",
    "modeling_gemma",
    "answers fast",
    "weights",
    "generation tickets encoding utils",
    "compiled",
    "running_rows slots",
    "engine",
    "inference",
    "data",
    # the wings: one room per thing that is done with the model
    "train evaluate bench tiny explore serve batch export",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
WINGS = set(LAYERS[LEVEL["train"]].split())
WINGS_THAT_USE_WINGS = {
    ("train", "evaluate"), ("tiny", "train"), ("tiny", "evaluate"), ("bench", "train"), ("bench", "serve"),
    ("export", "evaluate"), ("serve", "explore"),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------- reading the sources


@cache
def sources():
    """{path: syntax tree} of every module of the package."""
    return {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in sorted(ROOT.rglob("*.py"))}


def for_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree, inside_functions=True):
    """Every node that runs; with inside_functions=False only what runs at import."""
    for node in ast.iter_child_nodes(tree):
        if for_type_checking(node):
            continue
        if not inside_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from nodes(node, inside_functions)


def imports(path, tree, inside_functions=True):
    """Dotted names of what a module imports: `from a.b import c` is "a.b.c"; relative imports are resolved."""
    package = (ROOT.name, *path.relative_to(ROOT).parent.parts)
    for node in nodes(tree, inside_functions):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, name.name]) for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def module_of(name):
    """The file that a dotted name of ours lies in: "paligemma.train.loop.fit" -> "train.loop".

    A public name ("paligemma.load") lies where it is defined: `paligemma/__init__.py` is a lazy table that may name
    any room, and counts as no edge. `import paligemma` alone gives access to everything, so it counts as `inference`.
    """
    parts = name.split(".")[1:]
    if not parts or parts == ["*"]:
        return "inference"
    if parts[0] in paligemma._MODULE_OF:
        return paligemma._MODULE_OF[parts[0]]
    while parts:
        if ROOT.joinpath(*parts).with_suffix(".py").is_file() or ROOT.joinpath(*parts, "__init__.py").is_file():
            return ".".join(parts)
        parts.pop()  # the name of something inside the module
    return None  # paligemma.__version__


@cache
def module_graph():
    """{(file, file it imports)}, imports inside functions included: ("train.loop", "train.batches")."""
    edges = set()
    for path, tree in sources().items():
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if here == "__init__":
            continue
        ours = {name for name in imports(path, tree) if name.split(".")[0] == ROOT.name}
        edges |= {(here, there) for there in map(module_of, ours) if there not in (None, here)}
    return edges


def import_graph():
    """{(room, room it imports)}: the same with folders counting as one room."""
    rooms = {(here.split(".")[0], there.split(".")[0]) for here, there in module_graph()}
    return {(here, there) for here, there in rooms if here != there}


def circles(graph):
    """Groups of nodes that can all reach each other."""
    following = {}
    for here, there in graph:
        following.setdefault(here, set()).add(there)

    def reached_from(node):
        found, waiting = set(), [node]
        while waiting:
            new = following.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    reach = {node: reached_from(node) for node in following}
    return {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach if a in reach[a]}


# ---------------------------------------------------------------------------------------------- imports point one way


def test_the_graph_is_read():
    """The other tests mean something only if edges are found."""
    graph = module_graph()
    assert {("modeling_gemma", "kv_cache"), ("modeling_gemma", "modeling_siglip"), ("cli.main", "cli.run")} <= graph
    assert ("cli", "inference") in import_graph()
    assert ("kv_cache", "modeling_gemma") not in graph  # for the type checker alone
    assert not any("__init__" in (here, there) for here, there in graph)  # the lazy table is no edge


def test_circles_are_found():
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == {frozenset("abc")}
    assert not circles({("a", "b"), ("b", "c"), ("a", "c")})


def test_every_module_and_room_has_its_place():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sources()} - {"__init__"}
    assert rooms <= set(LEVEL), "give it a place in LAYERS"


def test_the_map_names_every_file_once():
    """`paligemma/README.md` is what a listing of the folder shows: a new file needs a line there."""
    named = re.findall(r"\]\(([^)#]+\.(?:py|cpp|h))\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    present = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    assert sorted(named) == sorted(present)


def test_imports_point_one_way():
    upward = {f"{here} -> {there}" for here, there in import_graph() if LEVEL[there] > LEVEL[here]}
    assert not upward


def test_no_room_imports_itself_in_a_circle():
    assert not circles(import_graph())


def test_no_file_imports_itself_in_a_circle():
    """Not between the files of one room either: a file can be understood from what stands below it."""
    assert not circles(module_graph())


def test_fast_layers_know_no_file_format_and_answers_know_no_weights():
    graph = import_graph()
    assert not graph & {("fast", "weights"), ("fast", "answers"), ("answers", "fast"), ("answers", "weights")}


def test_wings_import_only_the_wings_they_are_built_on():
    between = {(here, there) for here, there in import_graph() if {here, there} <= WINGS}
    assert {f"{here} -> {there}" for here, there in between - WINGS_THAT_USE_WINGS} == set()


# ---------------------------------------------------------------------------------------------- names in prose


@cache
def definitions():
    """{module or room: what it defines}; modules of one name in several rooms share an entry. Imports do not count."""
    defined = {ROOT.name: set(paligemma.__all__)}
    for path, tree in sources().items():
        module = path.parent.name if path.stem == "__init__" else path.stem
        every = list(ast.walk(tree))
        names = {node.name for node in every if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        names |= {node.id for node in every if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        defined.setdefault(module, set()).update(names)
        defined.setdefault(path.parent.name, set()).add(path.stem)
    return defined


def test_docstrings_and_comments_name_what_is_there():
    """`module.name` in backquotes is defined in that module of ours, where a reader will look for it."""
    endings = {"py", "h", "json", "jsonl", "parquet", "yaml", "md", "model"}  # `run.json` is a file
    for path in sources():
        named = re.findall(r"`(?:\w+/)*(\w+)\.(\w+)(?:\([^`]*\))?`", path.read_text(encoding="utf-8"))
        for module, name in named:
            if module in definitions() and name not in endings:
                assert name in definitions()[module], f"{path}: `{module}.{name}`"


# ---------------------------------------------------------------------------------------------- what is never used


def test_transformers_and_torchvision_are_not_needed():
    """The reference is for the tests, and for the benchmark's one file that times it where it is installed. (Names
    that its files use may be written down, of course.)"""
    for path, tree in sources().items():
        if path == ROOT / "bench" / "transformers_model.py":
            continue
        used = {name.split(".")[0] for name in imports(path, tree)}
        assert not used & {"transformers", "torchvision"}, path


def test_extras_are_imported_where_they_are_used():
    """A package from an extra may be missing: nothing that runs at import may need it."""
    extras = {
        "accelerate", "peft", "tensorboard", "faster_coco_eval", "pycocotools", "bitsandbytes", "sentencepiece",
        "matplotlib", "transformers", "pyarrow", "ray", "av",
    }  # fmt: skip
    for path, tree in sources().items():
        used = {name.split(".")[0] for name in imports(path, tree, inside_functions=False)}
        assert not used & extras, path


def test_no_pickle_is_ever_read():
    """A pickle runs code when it is opened, and a checkpoint comes from a stranger."""
    pickles = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path, tree in sources().items():
        assert not {name.split(".")[0] for name in imports(path, tree)} & pickles, path
        for node in nodes(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute | ast.Name):
                assert ast.unparse(node) not in ("torch.load", "torch.hub.load_state_dict_from_url"), where
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert node.arg == "allow_pickle" and ast.unparse(node.value) == "False", where
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in {name.name for name in node.names}, where


# ---------------------------------------------------------------------------------------------- importing does nothing


def run(code, *arguments, **environment):
    """Runs Python code in a process of its own and returns what it printed; it must not fail."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    cwd = environment.pop("CWD", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_instant():
    """`import paligemma` loads none of the heavy packages; the public names load them when they are used."""
    code = """
import sys
import paligemma
heavy = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
assert "load" in dir(paligemma)
paligemma.PaliGemmaConfig
assert "torch" in sys.modules
"""
    run(code)


def test_every_public_name_exists():
    for name in paligemma.__all__:
        assert getattr(paligemma, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        paligemma.laod  # noqa: B018


def commands(group=None, path=""):
    """Every command and group of the command line, read from the program itself: "", "run", "tiny scenes", ..."""
    group = group or typer.main.get_command(cli.app)
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path} {name}".strip())


def test_help_does_not_import_torch():
    """For the program and for each of its commands, as `python -m paligemma ... --help`."""
    code = """
import contextlib, io, json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = ["paligemma", *command.split(), "--help"]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_module("paligemma", run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
    assert "Usage: paligemma" in shown.getvalue(), (command, shown.getvalue())
    assert "torch" not in sys.modules, command
"""
    every = list(commands())
    assert {"", "run", "tiny scenes", "data check"} <= set(every)
    run(code, json.dumps(every))


def module_names():
    """Every module but `__main__`, which is for running."""
    dotted = (path.relative_to(ROOT.parent).with_suffix("").parts for path in sources())
    return [".".join(parts).removesuffix(".__init__") for parts in dotted if parts[-1] != "__main__"]


def files(*folders):
    """Every file below the folders, but for Python's own compiled copies."""
    found = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


def test_importing_every_module_has_no_side_effects(tmp_path):
    """Nothing is printed or written, and torch is left as it was: threads, dtype, gradients, random numbers."""
    home, here, temporary = (tmp_path / name for name in ("home", "here", "temporary"))
    for folder in (home, here, temporary):
        folder.mkdir()
    code = """
import importlib, json, os, sys
import torch

def state():
    return [
        torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.random.initial_seed(),
        torch.get_float32_matmul_precision(), torch.get_rng_state().sum().item(), sorted(os.environ),
        os.getcwd(), str(torch.get_default_device()), sys.path,
    ]

torch.manual_seed(7)
before = state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert state() == before, (before, state())
"""
    before = files(tmp_path, ROOT)
    places = {"HOME": str(home), "USERPROFILE": str(home), "TMPDIR": str(temporary), "CWD": str(here)}
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        places[name] = str(home / name)
    assert run(code, json.dumps(module_names()), **places) == ""
    assert files(tmp_path, ROOT) == before


def test_no_two_test_files_have_one_name():
    """pytest imports test files by their bare name, and would refuse the second one."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
