"""The sample video is found by its sha256, whichever way leads to it; the stand-ins for apt-get are scripts."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge.errors import CaptureError, ConfigError
from export.samples import VTEST, find_sample
from export.weights import Source

VIDEO = b"a very short video"
SUM = hashlib.sha256(VIDEO).hexdigest()
FOLDER = "usr/share/doc/opencv-doc/examples/data"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class Place:
    """A machine with nothing on it: no packages, no apt-get, and OpenCV's repository without the video."""

    def __init__(self, folder: Path, url: str) -> None:
        self.cache, self.root, self.bin, self.site = (folder / name for name in ("cache", "root", "bin", "site"))
        for path in (self.root, self.bin, self.site):
            path.mkdir()
        self.log = folder / "apt-get.log"
        self.sample = Source("vtest.avi", SUM, f"{url}/vtest.avi")

    def find(self, path: Path | None = None) -> Path:
        return find_sample(path, cache=self.cache, sample=self.sample, root=self.root)

    def script(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\nPATH={os.defpath}\n{body}\n")
        (self.bin / name).chmod(0o755)

    def package(self, video: bytes = VIDEO) -> Path:
        """What the package holds, as a tree, and a dpkg-deb that prints it as a tar."""
        tree = self.root.parent / "package"
        (tree / FOLDER).mkdir(parents=True)
        (tree / FOLDER / "other.avi").write_bytes(b"other")
        (tree / FOLDER / "vtest.avi").write_bytes(video)
        self.script("dpkg-deb", f'test "$1" = --fsys-tarfile && test -s "$2" && exec tar -C {tree} -cf - .')
        return tree

    def apt(self, body: str) -> None:
        """An apt-get that logs its arguments; `$last` is the word that says what to do."""
        self.script("apt-get", f'echo "$@" >> {self.log}\nfor last; do :; done\n{body}')

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "site"))) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        place = Place(tmp_path, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("PATH", str(place.bin))
        yield place
        server.shutdown()
        thread.join()


BRING = "echo package > opencv-doc_1_all.deb"


def test_a_named_path_is_taken_as_it_is(place: Place, tmp_path: Path) -> None:
    (tmp_path / "mine.avi").write_bytes(VIDEO)
    assert place.find(tmp_path / "mine.avi") == tmp_path / "mine.avi"
    assert not place.cache.exists()


def test_a_named_path_that_is_another_video_names_both_sums(place: Place, tmp_path: Path) -> None:
    (tmp_path / "mine.avi").write_bytes(b"holiday")
    got = hashlib.sha256(b"holiday").hexdigest()
    with pytest.raises(ConfigError, match=rf"mine.avi is another video.*{SUM}.*{got}"):
        place.find(tmp_path / "mine.avi")


def test_a_named_path_that_cannot_be_read(place: Place, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"gone.avi: got No such file or directory"):
        place.find(tmp_path / "gone.avi")
    with pytest.raises(CaptureError, match="Is a directory"):
        place.find(tmp_path)


def test_the_cached_copy_comes_first(place: Place) -> None:
    place.cache.mkdir()
    (place.cache / "vtest.avi").write_bytes(VIDEO)
    place.apt("exit 1")
    assert place.find() == place.cache / "vtest.avi"
    assert not place.log.exists()


def test_then_the_installed_package(place: Place) -> None:
    (place.root / FOLDER).mkdir(parents=True)
    (place.root / FOLDER / "vtest.avi").write_bytes(VIDEO)
    place.apt("exit 1")
    assert place.find() == place.root / FOLDER / "vtest.avi"
    assert not place.log.exists()


def test_then_the_package_from_apt(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.package()
    place.apt(f"echo Get:1 opencv-doc; {BRING}")
    assert place.find() == place.cache / "vtest.avi"
    assert (place.cache / "vtest.avi").read_bytes() == VIDEO
    assert [path.name for path in place.cache.iterdir()] == ["vtest.avi"]  # the package itself is not kept
    assert place.asked() == ["-o APT::Sandbox::User=root download opencv-doc"]
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["sample video", "Get", "sample video"]


@pytest.mark.parametrize("update", ["exit 0", "echo 'E: one source of three is dead' >&2; exit 100"])
def test_without_package_lists_it_fetches_private_ones(place: Place, update: str) -> None:
    place.package()
    place.apt(f"""
case "$*" in
*Dir::State::Lists=/*/lists*update) test -d lists/partial -a -d cache/archives/partial && touch lists/main; {update};;
*Dir::State::Lists=/*/lists*download*) test -f lists/main && {BRING};;
*) echo "E: Unable to locate package $last" >&2; exit 100;;
esac""")
    assert place.find().read_bytes() == VIDEO
    assert [line.split()[-1] for line in place.asked()] == ["opencv-doc", "update", "opencv-doc"]
    assert [path.name for path in place.cache.iterdir()] == ["vtest.avi"]


def test_a_relative_cache_folder_works_too(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place.cache = Path("cache")
    place.package()
    place.apt(f'case "$*" in *Lists=/*download*) {BRING};; *) exit 100;; esac')
    assert place.find() == Path("cache/vtest.avi")


def test_last_comes_the_repository(place: Place) -> None:
    (place.site / "vtest.avi").write_bytes(VIDEO)
    assert place.find() == place.cache / "vtest.avi"
    assert (place.cache / "vtest.avi").read_bytes() == VIDEO


@pytest.mark.parametrize(
    ("apt", "video", "said"),
    [
        (None, None, "apt-get: no apt-get on this machine"),
        ("echo 'E: Unable to locate package' >&2; exit 100", None, "apt-get: E: Unable to locate package"),
        ("exit 3", None, "apt-get: apt-get ended with 3"),
        ("exit 0", None, "apt-get: apt-get brought no package"),
        (BRING, None, "apt-get: .*dpkg-deb"),
        (BRING, b"another", f"apt-get: .* got sha256 {hashlib.sha256(b'another').hexdigest()}"),
    ],
)
def test_when_all_fails_it_lists_what_it_tried(place: Place, apt: str | None, video: bytes | None, said: str) -> None:
    if apt:
        place.apt(apt)
    if video:
        place.package(video)
    with pytest.raises(CaptureError) as caught:
        place.find()
    assert caught.match(
        rf"vtest.avi was not found \(cache: no .*; installed package: no .*; {said}.*; repository: .*HTTP 404.*\); get"
    )
    assert not (place.cache / "vtest.avi").exists()


def test_a_package_without_the_video(place: Place) -> None:
    (place.package() / FOLDER / "vtest.avi").unlink()
    place.apt(BRING)
    with pytest.raises(CaptureError, match=rf"no {FOLDER}/vtest.avi in opencv-doc_1_all.deb"):
        place.find()


def test_a_wrong_copy_in_the_cache_is_passed_over_and_replaced(place: Place) -> None:
    place.cache.mkdir()
    (place.cache / "vtest.avi").write_bytes(b"rotten")
    place.package()
    place.apt(BRING)
    assert place.find().read_bytes() == VIDEO


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not on this machine")
@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_a_real_package_is_unpacked(place: Place, tmp_path: Path, compression: str) -> None:
    real = shutil.which("dpkg-deb", path=os.defpath)
    assert real
    tree, package = place.package(), tmp_path / "opencv-doc_1_all.deb"
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: opencv-doc\nVersion: 1\nArchitecture: all\nMaintainer: A <a@localhost>\nDescription: a test\n"
    )
    build = [real, f"-Z{compression}", "--root-owner-group", "--build", str(tree), str(package)]
    made = subprocess.run(build, capture_output=True, text=True, check=False, env={"PATH": os.defpath})
    if made.returncode:
        pytest.skip(f"this dpkg-deb does not write {compression}: {made.stderr.strip()}")
    place.script("dpkg-deb", f'exec {real} "$@"')
    place.apt(f"cp {package} .")
    assert place.find().read_bytes() == VIDEO


def test_the_installed_sample_video_is_the_one(tmp_path: Path) -> None:
    installed = Path("/", FOLDER, VTEST.name)
    if not installed.is_file():
        pytest.skip("the package opencv-doc is not installed here")
    assert find_sample(cache=tmp_path) == installed
    assert installed.stat().st_size == VTEST.bytes
