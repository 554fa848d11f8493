"""A Debian package for the box: wheels, bundle, configuration, unit, and the scripts that make a release of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.utils import parse_wheel_filename
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from appliance.wheels import TARGETS, Target, WheelSet, last_words, run_pip, wheels_for
from edge.bundle import open_bundle, sha256_of
from edge.errors import ConfigError

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
EXTRA = "appliance"  # of pyproject.toml: what a box needs beside the dependencies
PAYLOAD = "usr/lib/lookout/payload"
MODES = {
    **dict.fromkeys((f"DEBIAN/{script}" for script in ("preinst", "postinst", "prerm", "postrm")), 0o755),
    "etc/lookout/edge.toml": 0o640,  # it holds the passwords of cameras
}


def build_images(archs: Sequence[str], bundle: Path, out: Path, console: Console) -> Iterator[Path]:
    """Build out/lookout_VERSION_ARCH.deb for each architecture.

    Raises ConfigError where a dependency has no wheel for one of the Pythons, after every such one was named;
    BundleError for a damaged bundle.
    """
    open_bundle(bundle)
    if shutil.which("dpkg-deb") is None:
        raise ConfigError("dpkg-deb is not here", remedy="an image is built on Debian or Ubuntu")
    out.mkdir(parents=True, exist_ok=True)
    epoch = source_date()
    with TemporaryDirectory(prefix="image-", dir=out) as place:
        folder = Path(place)
        project = _project_wheel(folder / "project", epoch, console)
        sets = wheel_sets([target for target in TARGETS if target.arch in archs], project, EXTRA, folder, console)
        pip = _pip_wheel(folder / "pip", console)
        for arch in archs:
            own = [one for one in sets if one.target.arch == arch]
            _print_wheels(arch, own, console)
            version = str(parse_wheel_filename(project.name)[1])
            write_tree(folder / arch, arch, version, own, bundle, pip)
            pack(folder / arch, deb := out / f"lookout_{version}_{arch}.deb", epoch, console)
            yield deb


def wheel_sets(targets: Sequence[Target], project: Path, extra: str, folder: Path, console: Console) -> list[WheelSet]:
    """The wheels of `project` and all that it needs, for each target, in folders of `folder`.

    Raises ConfigError where something has no wheel, after every such thing was printed.
    """
    sets = []
    for target in targets:
        began = time.monotonic()
        with console.status(f"wheels for {target}") as status:

            def tell(line: str, what: str = f"{target}: ", status: Status = status) -> None:
                status.update(what + escape(line))

            one = wheels_for(target, project, extra, folder / f"{target.arch}-{target.python}", tell)
        sets.append(one)
        console.print(f"wheels for {target}: {_sizes(one.wheels)}, {time.monotonic() - began:.0f} s")
    if missing := [lack for one in sets for lack in one.missing]:
        console.print(f"no wheel of {len(missing)}:")
        for lack in missing:
            console.print(f"  {escape(str(lack))}", soft_wrap=True)
        raise ConfigError(f"{len(missing)} requirements of the box have no wheel", remedy="each is named above")
    return sets


def source_date() -> int:
    """The moment that all files of a package bear, so that two builds of one commit are the same.

    $SOURCE_DATE_EPOCH, else the commit's. Raises ConfigError where there is neither.
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{ROOT} is no git repository", remedy="set SOURCE_DATE_EPOCH to the seconds of the release")
    return int(done.stdout)


def payload_id(version: str, payload: Path) -> str:
    """VERSION-HASH: the name of the release that this payload becomes."""
    files = sorted(file for file in payload.rglob("*") if file.is_file())
    lines = "".join(f"{file.relative_to(payload)} {sha256_of(file)}\n" for file in files)
    return f"{version}-{hashlib.sha256(lines.encode()).hexdigest()[:12]}"


def _project_wheel(folder: Path, epoch: int, console: Console) -> Path:
    words = ["wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    return _made_by_pip(words, folder, console, SOURCE_DATE_EPOCH=str(epoch))


def _pip_wheel(folder: Path, console: Console) -> Path:
    """pip itself, for the oldest Python of a box: an environment begins without one."""
    oldest = min(TARGETS, key=lambda target: target.glibc)
    return _made_by_pip(["download", "--no-deps", "--dest", str(folder), *oldest.pip_options, "pip"], folder, console)


def _made_by_pip(words: Sequence[str], folder: Path, console: Console, **env: str) -> Path:
    """The one wheel that pip leaves in the folder."""
    with console.status(words[-1]) as status:
        code, said = run_pip(words, lambda line: status.update(escape(line)), **env)
    if code:
        raise ConfigError(f"pip {words[0]} {words[-1]} failed", got=last_words(said))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _print_wheels(arch: str, sets: Sequence[WheelSet], console: Console) -> None:
    """A line per wheel: what it is, for which Pythons, its size, the file."""
    pythons: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for one in sets:
        for wheel in one.wheels:
            pythons.setdefault(wheel.name, []).append(one.target.python)
            sizes[wheel.name] = wheel.stat().st_size
    console.print(f"{arch}: dependency, version, Pythons, MB, wheel", highlight=False)
    for file in sorted(sizes):
        name, version, *_ = parse_wheel_filename(file)
        line = f"  {name:24} {version!s:12} {' '.join(pythons[file]):15} {sizes[file] / 1e6:5.1f}  {file}"
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def write_tree(tree: Path, arch: str, version: str, sets: Sequence[WheelSet], bundle: Path, pip: Path) -> None:
    """The package, file by file, as dpkg-deb takes it."""
    payload = tree / PAYLOAD
    (payload / "wheels").mkdir(parents=True)
    for one in sets:
        for wheel in one.wheels:  # those of several Pythons lie there once
            shutil.copyfile(wheel, payload / "wheels" / wheel.name)
        listed = "".join(f"./{wheel.name}\n" for wheel in one.wheels)
        (payload / f"python{one.target.python}.txt").write_text(listed, encoding="utf-8")
    shutil.copyfile(pip, payload / pip.name)
    shutil.copytree(bundle, payload / "bundle", copy_function=shutil.copyfile)
    (payload / "release").write_text(payload_id(version, payload) + "\n", encoding="utf-8")

    _put(HERE / "edge.toml", tree / "etc/lookout/edge.toml")
    for unit in ("lookout.service", "lookout-retry.service"):
        _put(HERE / unit, tree / "lib/systemd/system" / unit)
    _put(ROOT / "configs/edge.toml", tree / "usr/share/doc/lookout/edge.toml")
    _put(ROOT / "configs/README.md", tree / "usr/share/doc/lookout/README.md")
    _put(ROOT / "LICENSE", tree / "usr/share/doc/lookout/copyright")
    (tree / "usr/bin").mkdir()
    for program in ("edge", "collector"):
        (tree / "usr/bin" / program).symlink_to(f"/opt/lookout/current/venv/bin/{program}")

    size = sum(file.lstat().st_size for file in tree.rglob("*") if not file.is_dir())
    pythons = " ".join(one.target.python for one in sets)
    facts = {"VERSION": version, "ARCH": arch, "SIZE": str(-(-size // 1024)), "PYTHONS": pythons}
    (tree / "DEBIAN").mkdir()
    for file in sorted((HERE / "debian").iterdir()):
        text = file.read_text(encoding="utf-8")
        for name, value in facts.items():
            text = text.replace(f"@{name}@", value)
        (tree / "DEBIAN" / file.name).write_text(text, encoding="utf-8")


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def pack(tree: Path, deb: Path, epoch: int, console: Console) -> None:
    """dpkg-deb, with the same modes and times whoever builds, and whenever."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(MODES.get(str(path.relative_to(tree)), 0o755 if path.is_dir() else 0o644))
        os.utime(path, (epoch, epoch), follow_symlinks=False)
    began = time.monotonic()
    # wheels and weights hardly compress: the least effort is nearly as small, in a second; every dpkg of a box reads it
    command = ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", str(tree), str(deb)]
    with console.status(f"packing {deb}"):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
        )
    if done.returncode:
        raise ConfigError(f"{deb}: dpkg-deb failed", got=done.stderr)
    console.print(f"{deb}: {deb.stat().st_size / 1e6:.0f} MB, packed in {time.monotonic() - began:.0f} s")


def _sizes(wheels: Sequence[Path]) -> str:
    return f"{len(wheels)}, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:.0f} MB"
