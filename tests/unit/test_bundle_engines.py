"""An engine is the right one when every part of its fingerprint is; each other part is refused by its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.bundle import (
    DETECTOR,
    HALF,
    IMAGE,
    MANIFEST,
    SMALLER,
    Bundle,
    EngineFacts,
    EnginePlan,
    Fingerprint,
    Manifest,
    Network,
    Platform,
    open_bundle,
)
from edge.errors import BundleError
from tests.fakes import CONTENTS, manifest, sha256, write_bundle

HERE = Platform(tensorrt="10.3.0", compute_capability="8.7", gpu="Orin")
PLAN = EnginePlan(detector_batches=(1, 4), encoder_batches=(1, 8, 32), workspace_mib=64)
HALVES = {name: f"the bytes of {name}".encode() for name in HALF.values()}


def fingerprint(network: Network, platform: Platform = HERE, **changes: object) -> Fingerprint:
    fields = {"precision": "fp16", "onnx_sha256": sha256(HALVES[HALF[network]]), "batches": PLAN.batches(network)}
    return Fingerprint.model_validate({"platform": platform, **fields, **changes})


def facts(network: Network, one: Fingerprint) -> EngineFacts:
    return EngineFacts(network=network, graph=HALF[network], fingerprint=one, held=(), verified="cosine 0.9999")


@dataclass
class Engines:
    """A bundle on disk with these engines, by file name."""

    folder: Path
    engines: dict[str, EngineFacts] = field(default_factory=dict)
    plan: EnginePlan | None = PLAN

    def add(self, network: Network, one: Fingerprint) -> str:
        name = f"{network.removesuffix('.onnx')}-{one.short()}.engine"
        self.engines[name] = facts(network, one)
        return name

    def opened(self) -> Bundle:
        write_bundle(self.folder)
        contents = {**CONTENTS, **HALVES, **{name: name.encode() for name in self.engines}}
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)
        sums = {name: sha256(content) for name, content in contents.items()}
        (self.folder / MANIFEST).write_text(manifest(files=sums, engine=self.plan, engines=self.engines).to_json())
        return open_bundle(self.folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Engines:
    return Engines(tmp_path / "bundle")


def refusal(bundle: Bundle, network: Network, here: Platform = HERE) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.engine_for(network, here)
    message = str(caught.value)
    assert "`make export`" in message
    assert f"`python -m export engines {bundle.path}`" in message
    return message


def test_the_engine_for_exactly_this_platform_is_found(bundle: Engines) -> None:
    others = [Platform(tensorrt=v, compute_capability="8.7", gpu="Orin") for v in ("8.6.2", "10.7.0")]
    names = {network: bundle.add(network, fingerprint(network)) for network in HALF}
    for network, other in product(HALF, others):
        bundle.add(network, fingerprint(network, other))
    opened = bundle.opened()
    assert len(opened.manifest.engines) == 3 * len(HALF) == 9
    for network, name in names.items():
        found, told = opened.engine_for(network, HERE)
        assert (found, told) == (name, facts(network, fingerprint(network)))
        assert opened.file(found).read_bytes() == name.encode()


@pytest.mark.parametrize("network", list(HALF))
@pytest.mark.parametrize(
    ("changes", "what", "expected", "got"),
    [
        ({"tensorrt": "10.7.0"}, "TensorRT", "10.3.0", "10.7.0"),
        ({"compute_capability": "7.2"}, "compute capability", "8.7", "7.2"),
        ({"gpu": "NVIDIA Orin Nano"}, "GPU", "Orin", "NVIDIA Orin Nano"),
        ({"precision": "fp32"}, "precision", "fp16", "fp32"),
        ({"onnx_sha256": "0" * 64}, "-fp16.onnx", "sha256 ", "sha256 000000000000"),
        ({"batches": (1, 2)}, "batches", "(1, ", "(1, 2)"),
    ],
)
def test_each_part_of_the_fingerprint_that_differs_is_refused_by_name(
    network: Network, changes: dict[str, object], what: str, expected: str, got: str, bundle: Engines
) -> None:
    parts = {key: value for key, value in changes.items() if key in Platform.model_fields}
    rest = {key: value for key, value in changes.items() if key not in parts}
    name = bundle.add(network, fingerprint(network, HERE.model_copy(update=parts), **rest))
    message = refusal(bundle.opened(), network)
    assert f"{name}: built for another " in message
    assert f"{what}: expected {expected}" in message
    assert f", got {got};" in message


def test_of_several_wrong_engines_the_nearest_is_told(bundle: Engines) -> None:
    far = Platform(tensorrt="8.6.2", compute_capability="7.2", gpu="Xavier")
    bundle.add(IMAGE, fingerprint(IMAGE, far))
    near = bundle.add(IMAGE, fingerprint(IMAGE, HERE.model_copy(update={"tensorrt": "10.7.0"})))
    bundle.add(IMAGE, fingerprint(IMAGE, far.model_copy(update={"gpu": "Nano"})))
    message = refusal(bundle.opened(), IMAGE)
    assert near in message
    assert "another TensorRT: expected 10.3.0, got 10.7.0" in message


@pytest.mark.parametrize("plan", [PLAN, None])
def test_without_an_engine_there_is_none(plan: EnginePlan | None, bundle: Engines) -> None:
    bundle.plan = plan
    bundle.add(DETECTOR, fingerprint(DETECTOR))
    opened = bundle.opened()
    assert f"no engine for {IMAGE}" in refusal(opened, IMAGE)
    if plan is None:
        assert f"no engine for {DETECTOR}" in refusal(opened, DETECTOR)


def test_both_detectors_take_as_many_cameras_in_one_run() -> None:
    assert PLAN.batches(SMALLER) == PLAN.batches(DETECTOR) == (1, 4)
    assert PLAN.batches(IMAGE) == (1, 8, 32)


@pytest.mark.parametrize("damage", ["truncated", "random", "gone"])
def test_a_damaged_engine_is_refused_before_anyone_reads_it(damage: str, bundle: Engines) -> None:
    name = bundle.add(IMAGE, fingerprint(IMAGE))
    path = bundle.opened().file(name)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "truncated" else bytes(range(200)))
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle.folder)
    assert str(path) in str(caught.value)
    assert "`make export`" in str(caught.value)


def test_an_engine_that_is_no_file_of_the_bundle_is_refused(bundle_folder: Path) -> None:
    engines = {"image-1.engine": facts(IMAGE, fingerprint(IMAGE))}
    (bundle_folder / MANIFEST).write_text(manifest(engine=PLAN, engines=engines).to_json())
    with pytest.raises(BundleError, match=r"files: no image-1\.engine"):
        open_bundle(bundle_folder)


def test_a_manifest_with_engines_comes_back(tmp_path: Path) -> None:
    whole = manifest(engine=PLAN, engines={"a.engine": facts(DETECTOR, fingerprint(DETECTOR))})
    (tmp_path / MANIFEST).write_text(whole.to_json())
    assert Manifest.read(tmp_path / MANIFEST) == whole


def test_every_part_of_a_fingerprint_changes_its_name() -> None:
    one = fingerprint(IMAGE)
    others = [
        *(fingerprint(IMAGE, HERE.model_copy(update={key: "x"})) for key in Platform.model_fields),
        fingerprint(IMAGE, precision="fp32"),
        fingerprint(IMAGE, onnx_sha256="x"),
        fingerprint(IMAGE, batches=(1, 8)),
    ]
    assert len({one.short(), *(other.short() for other in others)}) == 1 + len(others)
    assert fingerprint(IMAGE).short() == one.short()
    assert len(one.short()) == 12


@given(st.lists(st.integers(-2, 40), max_size=4))
def test_batches_ascend_and_are_numbers_of_pictures(sizes: list[int]) -> None:
    good = bool(sizes) and min(sizes) > 0 and sizes == sorted(set(sizes))
    try:
        EnginePlan(detector_batches=tuple(sizes), encoder_batches=(1,), workspace_mib=1)
    except ValidationError:
        assert not good
    else:
        assert good
