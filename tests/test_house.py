"""The house guards itself: layout, budgets, import direction, names, and the first impression."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aligner_integrations"
NAME = "aligner_integrations"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))

# Lines each file may have; a folder's budget counts for each file in it.
FILE_BUDGETS = {
    "__init__.py": 40,
    "errors.py": 80,
    "correction.py": 160,
    "config.py": 150,
    "template.py": 240,
    "defuse.py": 110,
    "checksums.py": 70,
    "sentences.py": 400,
    "tokenizer.py": 200,
    "draft.py": 300,
    "decode.py": 350,
    "safeguards/": 400,
    "aligner.py": 340,
    "text_corrector.py": 190,
    "stream.py": 400,
    "options.py": 140,
    "closed_loop.py": 380,
    "read_ahead.py": 90,
    "read_ahead_async.py": 80,
    "continuation.py": 90,
    "finished.py": 130,
    "batch.py": 180,
    "resilience.py": 310,
    "backends/__init__.py": 90,
    "backends/base.py": 130,
    "backends/providers.py": 250,
    "backends/onnx.py": 400,
    "backends/onnx_graph.py": 330,
    "backends/session.py": 340,
    "backends/gathering.py": 300,
    "backends/torch.py": 300,
    "model_folder.py": 360,
    "sampling.py": 120,
    "export.py": 360,
    "llama_graph.py": 220,
    "logit_graph.py": 250,
    "stored_weights.py": 250,
    "cli.py": 400,
    "cli_options.py": 80,
    "terminal.py": 100,
    "doctor.py": 150,
    "testing/": 350,
    "langchain/listening.py": 360,
    "llama_index/llm.py": 360,
    "langchain/messages.py": 370,
    "langchain/chat_model.py": 400,
    "langchain/": 350,
    "llama_index/": 350,
    "training/": 350,
    "evaluation/": 350,
}
FUNCTION_BUDGET = 60
LONGER = {"from_pretrained": 70}  # three lines for each of its options
# Lines of the library proper: what each framework's adapter may take, and the rest together.
CEILINGS = {"langchain/": 4000, "llama_index/": 2000, "": 8000}
EXPORT = ("export.py", "llama_graph.py", "logit_graph.py", "stored_weights.py")
COMMAND = ("cli.py", "cli_options.py", "terminal.py", "doctor.py")
NOT_THE_LIBRARY_PROPER = ("training/", "evaluation/", "testing/", *COMMAND, *EXPORT)

# Which way imports point: a file imports from its own floor or below.
FLOORS = {
    0: (
        *("errors", "correction", "config", "template", "checksums", "sentences", "read_ahead"),
        *("read_ahead_async", "safeguards"),
    ),
    1: (
        *("decode", "draft", "sampling", "tokenizer", "defuse", "backends.base", "resilience"),
        "continuation",
    ),
    2: (
        *(
            "backends",
            "backends.onnx",
            "backends.onnx_graph",
            "backends.torch",
            "backends.providers",
            "backends.session",
        ),
        *("backends.gathering", "model_folder", "testing", "testing.doubles"),
    ),
    3: ("text_corrector", "aligner", "stream", "finished", "batch", "options", "closed_loop", ""),
    4: ("langchain", "llama_index"),
    5: (
        *(
            "cli",
            "cli_options",
            "terminal",
            "doctor",
            "training",
            "evaluation",
            "export",
            "llama_graph",
            "logit_graph",
            "stored_weights",
        ),
        *("testing.conformance", "testing.surfaces", "testing.heard"),
        *("testing.listeners", "testing.shown", "testing.replay"),
        *("testing.llama_index", "testing.llama_surfaces", "testing.llama_agents"),
        *("testing.llama_events", "testing.replay_llm", "testing.report", "testing.seen"),
    ),
}
# The doubles stand on floor 2 so that nothing below may lean on them; what they build are whole
# aligners, so their own imports reach one floor up.
REACHES_UP = {("testing.doubles", "aligner")}
# The conformance kits are about a framework each; the doubles beside them, and what both share, are not.
CONFORMANCE = tuple(
    f"testing/{name}.py" for name in ("conformance", "surfaces", "heard", "listeners", "shown", "replay")
)
LLAMA_CONFORMANCE = tuple(
    f"testing/{name}.py"
    for name in ("llama_index", "llama_surfaces", "llama_agents", "llama_events", "replay_llm")
)

CORE_NEEDS = {"numpy", "tokenizers", "sentencex", "huggingface_hub"}
# Third parties, and the only places that may import them.
OWNERS = {
    "langchain_core": ("langchain/", "evaluation/adapters.py", *CONFORMANCE),
    "langchain": ("langchain/middleware.py",),
    "langgraph": ("langchain/middleware.py", *CONFORMANCE),
    "llama_index": ("llama_index/", *LLAMA_CONFORMANCE),
    "onnxruntime": (
        "backends/onnx.py",
        "backends/onnx_graph.py",
        "backends/session.py",
        "export.py",
        "evaluation/",
    ),
    "onnx": (
        "export.py",
        "llama_graph.py",
        "logit_graph.py",
        "stored_weights.py",
        "training/",
        "evaluation/",
    ),
    "optimum": ("export.py", "evaluation/"),
    "torch": ("backends/torch.py", "export.py", "llama_graph.py", "training/", "evaluation/"),
    "safetensors": (
        "backends/torch.py",
        "export.py",
        "llama_graph.py",
        "stored_weights.py",
        "training/",
        "evaluation/",
    ),
    "transformers": ("backends/torch.py", "model_folder.py", "export.py", "training/", "evaluation/"),
    "matplotlib": ("evaluation/",),
    "typer": ("cli.py", "cli_options.py"),
    "rich": ("terminal.py", "training/", "evaluation/"),
    "pydantic": ("langchain/", "llama_index/", "testing/replay.py", "testing/replay_llm.py"),
}
# What a framework's base class prescribes is not ours to name.
PRESCRIBED_NAMES = {("langchain/middleware.py", "process")}
HIDING_NAMES = re.compile(r"(^|_)(utils?|helpers?|manager)(_|$)|^(process|handle_data)$|^do_")


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_of(path: Path) -> str:
    """`backends/onnx.py` -> `backends.onnx`; a package's own file is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    """The floor of the longest known name that `module` is, or lies in."""
    known = {name: floor for floor, names in FLOORS.items() for name in names}
    while module not in known:
        assert module, "a module without a floor"
        module = module.rpartition(".")[0]
    return known[module]


def is_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name.startswith(place) if place.endswith("/") else name == place for place in places)


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every import in `path` as (absolute dotted name, is it at module level)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which way they point"
            base = node.module or ""
            for alias in node.names:
                # `from package import module` imports the module, not a name of the package.
                inner = f"{base}.{alias.name}"
                source = ROOT / inner.replace(".", "/")
                is_module = source.with_suffix(".py").exists() or (source / "__init__.py").exists()
                found.append((inner if is_module else base, id(node) in top))
    return found


def test_every_file_has_a_place_and_a_floor() -> None:
    strays = [relative(p) for p in SOURCES if not is_in(relative(p), tuple(FILE_BUDGETS))]
    assert strays == []
    for path in SOURCES:
        floor_of(module_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_and_function_budgets(path: Path) -> None:
    name, source = relative(path), path.read_text(encoding="utf-8")
    budget = next(FILE_BUDGETS[place] for place in FILE_BUDGETS if is_in(name, (place,)))
    assert len(source.splitlines()) <= budget, f"{name} is over its {budget} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGER.get(node.name, FUNCTION_BUDGET), f"{name}: {node.name} has {length} lines"


@pytest.mark.parametrize("room", CEILINGS)
def test_library_stays_small(room: str) -> None:
    others = tuple(other for other in CEILINGS if other != room and other) if not room else ()
    lines = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCES
        if relative(path).startswith(room) and not is_in(relative(path), (*NOT_THE_LIBRARY_PROPER, *others))
    )
    assert lines < CEILINGS[room]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    here = module_of(path)
    for target, _ in imports_of(path):
        if target.split(".")[0] != NAME:
            continue
        there = target.removeprefix(NAME).removeprefix(".")
        allowed = (here, there) in REACHES_UP or floor_of(there) <= floor_of(here)
        assert allowed, f"floor {floor_of(here)}: {relative(path)} imports floor {floor_of(there)}: {target}"
        if here.split(".")[0] in ("langchain", "llama_index"):
            assert not there.startswith(("backends", "decode", "draft")), f"{relative(path)} imports {target}"
        rooms = {here.split(".")[0], there.split(".")[0]}
        assert rooms != {"langchain", "llama_index"}, f"{relative(path)} imports {target}"
    if here == "errors":
        assert all(target.split(".")[0] != NAME for target, _ in imports_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_third_parties_stay_in_their_rooms(path: Path) -> None:
    for target, _ in imports_of(path):
        root = target.split(".")[0]
        if root == NAME or root in sys.stdlib_module_names or root in CORE_NEEDS:
            continue
        assert is_in(relative(path), OWNERS.get(root, ())), f"{relative(path)} imports {target}"


def test_no_circles() -> None:
    graph = {
        module_of(path): {
            target.removeprefix(NAME).removeprefix(".")
            for target, at_top in imports_of(path)
            if at_top and target.split(".")[0] == NAME
        }
        for path in SOURCES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in graph.get(module, set()):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_name_hides_its_subject(path: Path) -> None:
    names = [path.stem]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name.lower())
    ours = [name for name in names if (relative(path), name) not in PRESCRIBED_NAMES]
    assert [name for name in ours if HIDING_NAMES.search(name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_surprises_on_import(path: Path) -> None:
    """The library proper prints nothing and reads or sets neither environment nor warning filters."""
    if is_in(relative(path), ("cli.py", "export.py", "training/", "evaluation/")):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "warnings.filterwarnings", "warnings.simplefilter")
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("os.environ", "os.getenv", "os.putenv"), relative(path)


def test_no_prompt_text_outside_template() -> None:
    frame = re.compile(
        r"BEGINNING OF CONVERSATION|##(Question|Answer|Correction|Revision|Your_Revision)|\[INST\]"
        r"|<\|(question|prefix|sentence|correction|feedback|start_header_id|im_start)\|>|<start_of_turn>"
    )
    for path in SOURCES:
        if relative(path) == "template.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not frame.search(node.value), f"{relative(path)}:{node.lineno} holds prompt text"


def public_modules() -> list[str]:
    """The modules whose names users import: the core, the adapters, the doubles, the checks."""
    names = ["", "langchain", "llama_index", "errors", "safeguards", "testing"]
    names += ["testing.conformance", "testing.llama_index"]
    places = {name: PACKAGE / name.replace(".", "/") for name in names}
    return [
        f"{NAME}.{name}".rstrip(".")
        for name, place in places.items()
        if place.with_suffix(".py").exists() or (place / "__init__.py").exists()
    ]


@pytest.mark.parametrize("name", public_modules())
def test_all_is_sorted_and_true(name: str) -> None:
    module = importlib.import_module(name)
    exported: list[str] | None = getattr(module, "__all__", None)
    if exported is None:
        assert not (module.__file__ or "").endswith("__init__.py"), f"{name} needs __all__"
        return
    assert exported == sorted(exported)
    assert len(set(exported)) == len(exported)
    for item in exported:
        assert hasattr(module, item), f"{name}.__all__ names {item}, which does not exist"


def test_core_all_is_complete() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    core = importlib.import_module(NAME)
    assert imported | {"__version__"} == set(core.__all__) | {"__version__"}
    contract = {"Aligner", "Correction", "DecodeConfig", "Edit", "Segment", "StreamCorrector"}
    assert contract <= set(core.__all__)


def test_changelog_and_version_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == importlib.import_module(NAME).__version__


def test_package_is_typed_and_carries_its_model() -> None:
    assert (PACKAGE / "py.typed").is_file()
    said = json.loads((PACKAGE / "models" / "tiny" / "aligner.json").read_text(encoding="utf-8"))
    assert said["template"] == "tiny"


def test_no_machine_paths_in_the_tree() -> None:
    """Text speaks of the project alone: no folder of the machine it was written on."""
    machine = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/")
    texts = [*SOURCES, *ROOT.glob("*.*"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.py")]
    texts += [*(ROOT / "examples").rglob("*.*"), ROOT / "Makefile"]
    for path in texts:
        if path.is_file() and path not in (Path(__file__).resolve(), ROOT / ".git"):
            assert not machine.search(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


LOADED = """
import json, sys
import aligner_integrations
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_import_loads_nothing_heavy() -> None:
    """`import aligner_integrations` loads no framework, no network and no command line."""
    result = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    loaded = set(json.loads(result.stdout))
    heavy = {"torch", "onnxruntime", "onnx", "transformers", "langchain_core", "langchain", "langgraph"}
    heavy |= {"llama_index", "typer", "rich", "pydantic"}
    assert loaded & heavy == set()
    assert NAME in loaded
