"""What TensorRT has in which version: the list of it against the real bindings, the project's code against the list."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge.trt import logger_of
from tests.fake_tensorrt import VERSIONS, fake_tensorrt, members

ROOT = Path(__file__).parents[2]

# All that the bindings look for in TensorRT's libraries when they are imported. NVIDIA publishes them without those,
# tensorrt-bindings and tensorrt-cu13-bindings, 1 MB: enough to read off what their classes have.
STUBS = """
#define S(name) void *name(void) { return 0; }
S(createInferBuilder_INTERNAL) S(createInferRefitter_INTERNAL) S(createInferRuntime_INTERNAL)
S(createNvOnnxParserRefitter_INTERNAL) S(createNvOnnxParser_INTERNAL) S(getNvOnnxParserVersion)
S(getBuilderPluginRegistry) S(getPluginRegistry) S(initLibNvInferPlugins)
S(_ZN11nvuffparser15createUffParserEv) S(_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi)
S(_ZN14nvcaffeparser117createCaffeParserEv) S(_ZN14nvcaffeparser123shutdownProtobufLibraryEv)
"""
READ = """
import importlib, json, sys
trt, kinds = importlib.import_module(sys.argv[1]), sys.argv[2:]
print(json.dumps([trt.__version__, dir(trt), {kind: dir(getattr(trt, kind)) for kind in kinds if hasattr(trt, kind)}]))
"""


def stubbed(package: Path, to: Path) -> dict[str, str]:
    """An environment in which the bindings without libraries can be imported."""
    if shutil.which("cc") is None:
        pytest.skip("the stubs for TensorRT's libraries need a C compiler")
    for name in set(re.findall(rb"libnv[a-z_]+\.so\.\d+", (package / "tensorrt.so").read_bytes())):
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name.decode()}", "-o", to / name.decode()]
        subprocess.run(command, input=STUBS.encode(), check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(to)}


def test_the_list_of_members_is_that_of_the_bindings_installed_here(tmp_path: Path) -> None:
    """Of TensorRT, as on a Jetson, or of its bindings alone; most machines have neither."""
    module = next((name for name in ("tensorrt", "tensorrt_bindings") if importlib.util.find_spec(name)), None)
    if module is None:
        pytest.skip("no bindings of TensorRT here: `pip install tensorrt-cu13-bindings` are enough")
    environment = dict(os.environ)
    if module == "tensorrt_bindings":
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        environment = stubbed(Path(spec.origin).parent, tmp_path)
    kinds = sorted({kind for version in VERSIONS for kind in members(version)} - {"module"})
    command = [sys.executable, "-W", "ignore", "-c", READ, module, *kinds]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    version, names, found = json.loads(told)
    short = ".".join(version.split(".")[:3])
    if short not in VERSIONS:
        pytest.skip(f"TensorRT {version} is none of {VERSIONS}")
    listed = dict(members(short))
    assert listed.pop("module") <= set(names)
    assert set(listed) == set(found)
    for kind, wanted in listed.items():
        assert wanted == {name for name in found[kind] if not name.startswith("_")}, kind


def versions_with(name: str) -> frozenset[str]:
    """Where some class, or the module, has a member of this name."""
    return frozenset(version for version in VERSIONS if any(name in found for found in members(version).values()))


@pytest.mark.parametrize("path", ["edge/trt.py", "edge/lane.py", "export/engine.py"])
def test_members_that_the_project_touches_are_in_every_version_or_asked_for(path: str) -> None:
    """By name: whatever is read off an object and is a member of some class of TensorRT.

    One that not every version has needs a `hasattr` in the same file, of a name that comes, or goes, no sooner.
    """
    tree = ast.parse((ROOT / path).read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = [node for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"]
    used = {node.attr: versions_with(node.attr) for node in attributes if node not in own}
    asked = [
        versions_with(argument.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "hasattr"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    ]
    branches = [found for one in asked for found in (one, frozenset(VERSIONS) - one)]
    touched = {name: found for name, found in used.items() if found}
    assert len(touched) > 3
    for name, found in touched.items():
        assert found == set(VERSIONS) or any(branch and branch <= found for branch in branches), name


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_has_what_its_version_has_and_no_more(version: str) -> None:
    trt = fake_tensorrt(version)
    for other in VERSIONS:
        for kind, names in members(other).items():
            if kind == "module":
                continue
            if kind not in members(version)["module"]:
                with pytest.raises(AttributeError, match=f"TensorRT {version} has no {kind}"):
                    getattr(trt, kind)
                continue
            for name in names - members(version)[kind] - {"name", "value", "itemsize"}:
                assert not hasattr(getattr(trt, kind), name), f"{version}: {kind}.{name}"
    with pytest.raises(AttributeError, match=rf"TensorRT {version} has no (IBuilderConfig\.)?no_such"):
        trt.Builder(logger_of(trt)).create_builder_config().no_such = 1
