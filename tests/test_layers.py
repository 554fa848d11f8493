"""The import rule of the design, held over every module: who may import whom, and who may import heavy packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("edge", "export", "collector", "appliance")

# what all stages speak of; boxes, images, schedule, zones: pure functions; failpoints: where tests kill a process
WORDS = frozenset({"errors", "values", "boxes", "images", "address", "schedule", "zones", "failpoints"})
CONTRACTS = frozenset({"bank", "bundle", "events", "config", "protocol"})
DELIVERY = frozenset(
    {"keys", "link", "records", "wal", "leaves", "aside", "journal", "shelf", "spool"}
)  # what publish is made of
PIXELS = frozenset({"placement", "imaging"})  # frames to the pictures that networks take, on the CPU
DEVICES = frozenset({"ort", "trt", "lane", "gpu", "cuda", "cuda_bindings", "cuda_pycuda"})
STAGES = frozenset(
    {
        "capture",
        "detect",
        "crop",
        "encode",
        "match",
        "golden",
        "track",
        "identities",
        "publish",
        "push",
        "draw",
        "motion",
    }
)
# what capture is made of
SOURCES = frozenset({"knock", "steps", "pace", "still", "footage", "opencv", "gstreamer", "live", "decoders"})
DOCTOR = frozenset({"clock", "doctor", "jetson", "pairs", "probes", "reach"})  # what is here, and what to do about it

# file of edge/ -> the files of edge/ it may import
EDGE: dict[str, frozenset[str]] = {
    "__init__": frozenset(),
    "errors": frozenset(),
    "values": frozenset({"errors"}),
    "boxes": frozenset({"errors", "values"}),
    "images": frozenset({"errors", "values"}),
    "zones": frozenset({"errors", "values"}),
    "schedule": frozenset(),
    "failpoints": frozenset(),
    **dict.fromkeys(CONTRACTS, WORDS),
    "bundle": WORDS | {"bank"},
    "commands": frozenset({"errors"}),
    **dict.fromkeys(("notify", "journald", "heap", "disk"), frozenset()),
    "watchdog": WORDS | CONTRACTS | {"capture", "notify"},
    "releases": WORDS | {"disk"},
    "activate": WORDS | DEVICES | {"releases"},
    "placement": WORDS | CONTRACTS,
    "imaging": WORDS | CONTRACTS | {"placement", "backend"},
    "backend": WORDS | {"bank", "bundle", "imaging"} | DEVICES,
    **dict.fromkeys(DEVICES, WORDS | {"bundle", "backend"}),
    "cuda": WORDS | {"cuda_bindings", "cuda_pycuda"},
    **dict.fromkeys(("cuda_bindings", "cuda_pycuda"), WORDS | {"cuda"}),
    "lane": WORDS | {"cuda"},
    "trt": WORDS | {"bundle", "backend", "cuda", "lane"},
    "gpu": WORDS | CONTRACTS | PIXELS | {"backend", "cuda"},
    **dict.fromkeys(STAGES, WORDS | CONTRACTS | PIXELS | {"backend"}),
    "address": frozenset(),
    "pace": frozenset(),
    **dict.fromkeys(("steps", "still"), frozenset({"errors", "values"})),
    **dict.fromkeys(("footage", "knock"), WORDS | {"steps"}),
    **dict.fromkeys(("opencv", "gstreamer"), WORDS | {"knock"}),
    "live": WORDS | {"pace", "steps", "still"},
    "decoders": WORDS | {"config", "gstreamer", "jetson", "live", "opencv"},
    "capture": WORDS | CONTRACTS | SOURCES,
    "keys": WORDS | CONTRACTS,
    "link": WORDS | CONTRACTS,
    "records": WORDS,
    "wal": frozenset({"records"}),
    "leaves": frozenset({"records", "wal"}),
    "aside": frozenset({"errors", "disk", "wal"}),
    "journal": WORDS | CONTRACTS | {"link", "records"},
    "shelf": WORDS | CONTRACTS | {"disk", "journal", "records", "leaves", "aside"},
    "spool": WORDS | CONTRACTS | {"link", "journal", "records", "shelf"},
    "publish": WORDS | CONTRACTS | DELIVERY,
    "health": frozenset({"errors"}),
    "metrics": WORDS
    | CONTRACTS
    | {"capture", "clock", "describe", "health", "jetson", "ladder", "motion", "publish", "push"},
    "describe": WORDS | CONTRACTS | STAGES | PIXELS | {"backend"},
    "pipeline": WORDS | CONTRACTS | STAGES | PIXELS | {"describe"},
    "reload": WORDS | CONTRACTS,
    "ladder": frozenset({"config"}),
    "share": frozenset({"capture"}),
    "load": frozenset({"config", "capture", "describe", "jetson", "ladder", "share"}),
    "clock": frozenset(),
    **dict.fromkeys(("jetson", "pairs", "reach"), WORDS | CONTRACTS),
    "probes": WORDS | CONTRACTS | {"clock", "gstreamer", "jetson"},
    "doctor": WORDS | CONTRACTS | DEVICES | {"clock", "gstreamer", "jetson", "pairs", "probes", "reach"},
    "serve": WORDS
    | CONTRACTS
    | DELIVERY
    | STAGES
    | PIXELS
    | {"backend", "clock", "describe", "pipeline", "reload", "load", "health", "metrics", "watchdog", "notify"},
    "cli": WORDS
    | CONTRACTS
    | STAGES
    | PIXELS
    | DEVICES
    | DOCTOR
    | {"backend", "describe", "serve", "keys", "journald", "heap", "commands", "releases", "activate"},
}
EXPORT = (
    WORDS
    | CONTRACTS
    | PIXELS
    | DEVICES
    | {"disk", "backend", "commands", "detect", "crop", "encode", "match", "golden"}
)
APPLIANCE = WORDS | {"config", "bank", "bundle", "commands"}
# link and publish: a store that is sent on to another collector; health: the HTTP part alone
COLLECTOR = WORDS | {
    *("events", "protocol", "keys", "link", "publish", "bank", "bundle", "commands", "match", "health", "heap"),
}

# the one import between export and collector, deferred: how words become vectors is written once
ACROSS = {"collector.search": "export.prompts"}

# package from outside -> the only modules that may import it
HEAVY: dict[str, frozenset[str]] = {
    "onnxruntime": frozenset({"edge.ort"}),
    "tensorrt": frozenset({"edge.trt"}),
    "pycuda": frozenset({"edge.cuda_pycuda"}),
    "cuda": frozenset({"edge.cuda_bindings"}),
    "nats": frozenset({"collector.nats"}),
    "gi": frozenset({"edge.gstreamer"}),
    "torch": frozenset(),
}


@dataclass(frozen=True)
class Import:
    """One import: of which module, on which line, and whether it waits until a function is called."""

    target: str
    line: int
    deferred: bool


def imports_of(module: str, source: str, known: frozenset[str]) -> Iterator[Import]:
    """Every import of a module, at any depth; `known`: all modules of the project, to tell `from edge import config`
    from a name that edge itself defines."""

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, deferred) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = module.split(".")[: -child.level] if child.level else []
                base = ".".join([*start, *([child.module] if child.module else [])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    yield Import(inner if inner in known else base, child.lineno, deferred)
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("__import__", "importlib.import_module"):
                name = child.args[0] if child.args else None
                yield Import(name.value if isinstance(name, ast.Constant) else "?", child.lineno, deferred)
            inside = deferred or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            inside = inside or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
            yield from walk(child, inside)

    return walk(ast.parse(source), False)


def fault(module: str, found: Import) -> str | None:
    """The rule that an import breaks, in words."""
    package, _, name = module.partition(".")
    target, _, part = found.target.partition(".")
    if found.target == "?":
        return "an import by a computed name hides what is imported"
    if target in HEAVY and module not in HEAVY[target]:
        return f"{target} is imported by {', '.join(sorted(HEAVY[target])) or 'nothing'} only"
    if target == "onnx" and package != "export":
        return "onnx is a tool of export only"
    if target not in PACKAGES:
        return "tests are imported by nothing" if target == "tests" else None
    if package == "edge" and name not in EDGE:
        return f"edge.{name} has no layer: name it in this test and in the design"
    if ACROSS.get(module) == found.target:
        return None if found.deferred else f"{found.target} is imported inside the function that needs it"
    if target != package and (package == "edge" or target != "edge"):
        return f"{package} never imports {target}"
    if target != "edge" or not part:
        return None  # within a package other than edge, and the empty edge/__init__.py
    allowed = {"edge": EDGE.get(name, frozenset()), "export": EXPORT, "collector": COLLECTOR, "appliance": APPLIANCE}[
        package
    ]
    if part == "commands" and name != "cli":
        return "only the command lines import edge.commands"
    if part not in allowed:
        may = ", ".join(sorted(allowed)) or "nothing"
        return f"{module if package == 'edge' else package + '/*'} may import of edge: {may}"
    if part in DEVICES and not (package == "edge" and name in DEVICES) and not found.deferred:
        return "a device is imported inside the function that needs it"
    return None


def violations(sources: dict[str, tuple[str, str]]) -> list[str]:
    """One message for each broken rule. sources: module -> file name, text."""
    known = frozenset(sources)
    return [
        f"{file}:{found.line}: {module} imports {found.target}: {broken}"
        for module, (file, text) in sources.items()
        for found in imports_of(module, text, known)
        if (broken := fault(module, found))
    ]


def project(root: Path) -> dict[str, tuple[str, str]]:
    """Every module of the packages."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    places = {file: file.relative_to(root) for file in files}
    return {
        ".".join(place.with_suffix("").parts): (str(place), file.read_text(encoding="utf-8"))
        for file, place in places.items()
    }


def test_no_module_imports_what_its_layer_may_not(root: Path) -> None:
    sources = project(root)
    assert {module.partition(".")[0] for module in sources} == set(PACKAGES)
    assert len(sources) > 30
    broken = violations(sources)
    assert not broken, "\n".join(broken)


def test_every_file_of_edge_has_a_layer(root: Path) -> None:
    files = {file.stem for file in (root / "edge").glob("*.py")}
    assert files <= set(EDGE), f"without a layer: {sorted(files - set(EDGE))}"
    assert not [path for path in (root / "edge").iterdir() if path.is_dir() and path.name != "__pycache__"], "flat"


def test_the_rule_has_no_circle() -> None:
    """Whatever the files hold, no two of edge can wait for each other while they load."""
    # what a device needs is imported when a session is opened
    left = {**EDGE, "backend": EDGE["backend"] - DEVICES - PIXELS, "cuda": EDGE["cuda"] - DEVICES}
    while left:
        free = [name for name, allowed in left.items() if not allowed & set(left)]
        assert free, f"a circle among {sorted(left)}"
        left = {name: allowed for name, allowed in left.items() if name not in free}


PLANTED = [
    ("edge.detect", "import edge.crop", "edge.detect may import of edge"),
    ("edge.detect", "from edge.crop import cut", "edge.detect may import of edge"),
    ("edge.detect", "from edge import crop", "edge.detect may import of edge"),
    ("edge.detect", "from . import crop", "edge.detect may import of edge"),
    ("edge.detect", "from .crop import cut as snip", "edge.detect may import of edge"),
    ("edge.detect", "from edge.ort import OrtSession", "edge.detect may import of edge"),
    ("edge.detect", "def f():\n    from edge.ort import OrtSession", "edge.detect may import of edge"),
    ("edge.golden", "from edge.detect import fit", "edge.golden may import of edge"),
    ("edge.values", "from edge.config import Settings", "edge.values may import of edge: errors"),
    ("edge.errors", "from edge.values import Frame", "edge.errors may import of edge: nothing"),
    ("edge.boxes", "if True:\n    import edge.bundle", "edge.boxes may import of edge: errors, values"),
    ("edge.config", "from edge.bundle import Precision", "edge.config may import of edge"),
    ("edge.commands", "from edge.values import Frame", "edge.commands may import of edge: errors"),
    ("edge.pipeline", "from edge.cli import main", "edge.pipeline may import of edge"),
    ("edge.pipeline", "from edge.backend import Session", "edge.pipeline may import of edge"),
    ("edge.pipeline", "from edge.commands import Commands", "only the command lines"),
    ("edge.cli", "from edge.ort import OrtSession", "inside the function"),
    ("edge.backend", "from edge.ort import OrtSession", "inside the function"),
    ("edge.backend", "class A:\n    from edge.ort import OrtSession", "inside the function"),
    ("edge.backend", "try:\n    pass\nfinally:\n    import edge.trt", "inside the function"),
    ("edge.cli", "def f():\n    from export.pack import reuse", "edge never imports export"),
    ("edge.cli", "import collector", "edge never imports collector"),
    ("edge.detect", "import importlib\nimportlib.import_module('edge.crop')", "edge.detect may import of edge"),
    ("edge.detect", "__import__('edge.crop')", "edge.detect may import of edge"),
    ("edge.detect", "name = 'edge.crop'\n__import__(name)", "computed name"),
    ("edge.utils", "import edge.errors", "edge.utils has no layer"),
    ("export.verify", "from edge.publish import Publisher", "export/* may import of edge"),
    ("export.verify", "from edge.pipeline import run", "export/* may import of edge"),
    ("export.verify", "from edge.commands import Commands", "only the command lines"),
    ("export.engine", "import edge.trt", "inside the function"),
    ("export.verify", "from collector.store import Store", "export never imports collector"),
    ("collector.server", "from edge.config import Settings", "collector/* may import of edge"),
    ("collector.server", "from edge.detect import fit", "collector/* may import of edge"),
    ("collector.store", "from edge.commands import Commands", "only the command lines"),
    ("collector.server", "import export.clip as clip", "collector never imports export"),
    ("collector.server", "def f():\n    from export.prompts import embed_prompts", "collector never imports export"),
    ("collector.search", "def f():\n    from export.tokenizer import Tokenizer", "collector never imports export"),
    ("collector.search", "from export.prompts import embed_prompts", "inside the function"),
    ("appliance.image", "from edge.detect import fit", "appliance/* may import of edge"),
    ("appliance.image", "from export.build import build", "appliance never imports export"),
    ("export.build", "import appliance.image", "export never imports appliance"),
    ("edge.cli", "def f():\n    from appliance.image import build_images", "edge never imports appliance"),
    ("edge.detect", "import tests.fakes", "tests are imported by nothing"),
    ("edge.detect", "import onnxruntime as ort", "onnxruntime is imported by edge.ort only"),
    ("edge.ort", "import onnx", "onnx is a tool of export only"),
    ("collector.store", "from onnx import helper", "onnx is a tool of export only"),
    ("edge.ort", "def f():\n    import tensorrt", "tensorrt is imported by edge.trt only"),
    ("export.clip", "import torch.nn", "torch is imported by nothing only"),
]


@pytest.mark.parametrize(("module", "text", "rule"), PLANTED)
def test_a_planted_violation_is_found(root: Path, module: str, text: str, rule: str) -> None:
    file = module.replace(".", "/") + ".py"
    (found,) = violations({**dict.fromkeys(project(root), ("", "")), module: (file, '"""Why."""\n\n' + text + "\n")})
    place, line, message = found.split(":", 2)
    assert place == file
    assert line == str(2 + len(text.splitlines())), "the planted import is the last line"
    assert rule in message
    assert f"{module} imports " in message


ALLOWED = [
    ("edge.detect", "from edge.boxes import iou\nfrom edge import config\nimport cv2"),
    ("edge.detect", "from __future__ import annotations\nfrom edge import errors as what"),
    ("edge.publish", "from edge.spool import Spool"),
    ("edge.trt", "import tensorrt\nfrom edge.cuda import Cuda"),
    ("edge.backend", "def f():\n    from edge.ort import OrtSession"),
    ("export.engines", "if TYPE_CHECKING:\n    from edge.cuda import Cuda"),
    ("edge.cli", "from edge.serve import serve\nfrom edge.commands import Commands\ndef f():\n    import edge.trt"),
    ("export.cli", "import onnx\nfrom edge.commands import Commands\nfrom export.pack import reuse"),
    ("export.verify", "from . import pack\nfrom .pack import reuse"),
    ("collector.cli", "from edge.commands import Commands\nfrom collector.store import Store"),
    ("collector.search", "from edge.match import match"),
    ("collector.search", "def f():\n    from export.prompts import embed_prompts"),
]


@pytest.mark.parametrize(("module", "text"), ALLOWED)
def test_what_is_allowed_is_not_reported(root: Path, module: str, text: str) -> None:
    assert violations({**dict.fromkeys(project(root), ("", "")), module: ("a.py", text)}) == []


BLOCKED = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
for name in {modules}:
    importlib.import_module(name)
assert not set({blocked}) & set(sys.modules)
"""


def load_without(blocked: list[str], modules: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    """Import these modules in a fresh Python, warnings being errors, where some packages are not to be had."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED.format(blocked=blocked, modules=modules)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_box_and_collector_load_without_what_they_do_not_need(root: Path) -> None:
    modules = [module for module in project(root) if module.startswith(("edge.", "collector."))]
    optional = DEVICES | {"nats"}
    own = [module for module in modules if module.partition(".")[2] not in optional and "__init__" not in module]
    absent = [
        "onnx",
        "nats",
        "torch",
        "tensorrt",
        "pycuda",
        "cuda",
        "scipy",
        "matplotlib",
        "tokenizers",
        "safetensors",
        "hypothesis",
        "pytest",
    ]
    done = load_without([*absent, "onnxruntime"], ["edge", "collector", *own], root)
    assert done.returncode == 0, done.stderr
    done = load_without(absent, ["edge.ort"], root)
    assert done.returncode == 0, done.stderr


def test_a_box_builds_engines_with_onnx_alone(root: Path) -> None:
    done = load_without(["tokenizers", "safetensors", "scipy", "matplotlib"], ["export.cli"], root)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks(root: Path) -> None:
    done = load_without(["onnxruntime"], ["edge.ort"], root)
    assert done.returncode != 0
    assert "blocked: onnxruntime" in done.stderr
