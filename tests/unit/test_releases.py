"""Which release serves: one whole one, whatever fails, whoever is killed, and however often one goes back and forth."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge.activate import Box, activate, rollback
from edge.errors import BackendError, BundleError, ConfigError, LookoutError, ModelError
from edge.failpoints import RELEASES
from edge.releases import Releases
from tests.box_releases import Unit, box, install, links

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "opt"
    folder.mkdir()
    return folder


def serving(home: Path, *names: str) -> Unit:
    """Releases installed and activated one after the other."""
    unit = Unit(home)
    for age, name in enumerate(names):
        install(home, name, age=1000 - age)
        activate(box(home, unit=unit), name)
    return unit


def test_the_first_release_serves(home: Path) -> None:
    said: list[str] = []
    install(home, "1")
    unit = Unit(home)
    activate(box(home, said, unit=unit), "1")
    assert links(home) == {"current": "1"}
    assert unit.ran == ["1"]
    assert said == [
        "release 1; nothing serves",
        "check …",
        f"  edge check {home}/edge.toml --bundle {home}/releases/1/bundle",
        "self-test …",
        f"  edge selftest --bundle {home}/releases/1/bundle",
        "current: 1",
        "1 is ready",
        "1 serves",
    ]


def test_the_second_one_knows_the_one_before(home: Path) -> None:
    unit = serving(home, "1", "2")
    assert links(home) == {"current": "2", "previous": "1"}
    assert (home / "current").readlink() == Path("releases/2")  # also right where the whole disk is mounted elsewhere
    assert unit.ran == ["1", "2"]


def test_back_and_forth(home: Path) -> None:
    unit = serving(home, "1", "2")
    said: list[str] = []
    rollback(box(home, said, unit=unit))
    assert links(home) == {"current": "1", "previous": "2"}
    assert said[-1] == "1 serves; edge rollback returns to 2"
    rollback(box(home, unit=unit))
    assert links(home) == {"current": "2", "previous": "1"}


def test_nothing_to_go_back_to(home: Path) -> None:
    unit = serving(home, "1")
    with pytest.raises(ConfigError, match="no release before 1"):
        rollback(box(home, unit=unit))
    assert links(home) == {"current": "1"}


def test_the_same_again_is_a_restart(home: Path) -> None:
    unit = serving(home, "1", "2")
    activate(box(home, unit=unit), "2")
    assert links(home) == {"current": "2", "previous": "1"}
    assert unit.ran == ["1", "2", "2"]


def test_the_same_again_that_no_longer_gets_ready_stays(home: Path) -> None:
    """As after a bad edit of its configuration: the release before is no more able to read that."""
    unit = serving(home, "1", "2")
    (home / "releases/2/never-ready").touch()
    with pytest.raises(BackendError, match="did not get ready"):
        activate(box(home, unit=unit), "2")
    assert links(home) == {"current": "2", "previous": "1"}


@pytest.mark.parametrize(
    ("step", "code", "error"),
    [
        ("check", 78, ConfigError),
        ("check", 2, BackendError),
        ("selftest", 72, BundleError),
        ("selftest", 65, ModelError),
        ("selftest", 1, BackendError),
    ],
)
def test_what_fails_before_the_switch_changes_nothing(
    home: Path, step: str, code: int, error: type[LookoutError]
) -> None:
    unit, said = serving(home, "1"), list[str]()
    install(home, "2", fails={step: code})
    with pytest.raises(error, match=rf"failed, exit code {code}; 1 serves as before"):
        activate(box(home, said, unit=unit), "2")
    assert f"  error: {step} is not good" in said
    assert links(home) == {"current": "1"}
    assert unit.ran == ["1"]  # it was not even restarted


def test_what_never_gets_ready_is_taken_back(home: Path) -> None:
    unit, said = serving(home, "0", "1"), list[str]()
    install(home, "2", ready=False)
    with pytest.raises(BackendError, match="did not get ready"):
        activate(box(home, said, unit=unit), "2")
    assert links(home) == {"current": "1", "previous": "0"}
    assert unit.ran[-2:] == ["2", "1"]
    assert said[-4:-1] == ["failed: the unit did not get ready", "  last words of 2", "back to 1"]
    assert re.fullmatch(r"1 serves again, after \d+\.\d s", said[-1])


def test_what_gets_ready_and_dies_is_taken_back(home: Path) -> None:
    unit = serving(home, "1")
    (install(home, "2") / "dies").touch()
    with pytest.raises(BackendError, match="did not stay ready"):
        activate(box(home, unit=unit), "2")
    assert links(home) == {"current": "1"}


@pytest.mark.parametrize("part", [".trial.part", ".current.part"])
def test_a_disk_that_refuses_the_switch_changes_nothing(home: Path, part: str) -> None:
    unit = serving(home, "0", "1")
    install(home, "2")
    (home / part).mkdir()  # no link can be made there
    with pytest.raises(OSError, match=part):
        activate(box(home, unit=unit), "2")
    assert links(home) == {"current": "1", "previous": "0"}


def test_a_first_release_that_never_gets_ready_leaves_nothing(home: Path) -> None:
    install(home, "1", ready=False)
    unit, said = Unit(home), list[str]()
    with pytest.raises(BackendError):
        activate(box(home, said, unit=unit), "1")
    assert links(home) == {}
    assert unit.ran == ["1", None]
    assert said[-2:] == ["back to nothing", "nothing serves"]


def test_neither_gets_ready(home: Path) -> None:
    unit = serving(home, "1")
    (home / "releases/1/never-ready").touch()
    install(home, "2", ready=False)
    with pytest.raises(BackendError, match="the release before, 1, does not get ready either"):
        activate(box(home, unit=unit), "2")
    assert links(home) == {"current": "1"}


class Interrupted(Unit):
    """Somebody presses Ctrl-C while the new release starts."""

    def restart(self) -> None:
        super().restart()
        if self.ran[-1] == "2":
            raise KeyboardInterrupt


def test_ctrl_c_goes_back(home: Path) -> None:
    serving(home, "1")
    install(home, "2")
    unit = Interrupted(home)
    with pytest.raises(KeyboardInterrupt):
        activate(box(home, unit=unit), "2")
    assert links(home) == {"current": "1"}
    assert unit.ran == ["2", "1"]


def test_without_systemd_only_the_links_change(home: Path) -> None:
    for name in ("1", "2"):
        install(home, name)
        made = box(home)
        activate(Box(made.releases, made.config, None, made.say, made.builds), name)
    assert links(home) == {"current": "2", "previous": "1"}


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("3", ConfigError, "no release '3': expected one of those here: 2, 1"),
        ("../releases/1", ConfigError, "no release"),
        (".", ConfigError, "no release"),
        ("", ConfigError, "no release"),
        (".gone-1", ConfigError, "no release"),
        ("half", BundleError, "not wholly installed; install its package again"),
    ],
)
def test_what_is_no_release_is_refused(home: Path, name: str, error: type[LookoutError], text: str) -> None:
    serving(home, "1", "2")
    for left in ("half", ".gone-1"):
        (home / "releases" / left).mkdir()
    with pytest.raises(error, match=re.escape(text)):
        activate(box(home), name)
    assert links(home) == {"current": "2", "previous": "1"}


def test_no_releases_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no releases on this machine; install"), Releases(tmp_path / "opt").alone():
        pass
    assert Releases(tmp_path / "opt").all() == []


def test_one_at_a_time(home: Path) -> None:
    serving(home, "1")
    install(home, "2")
    with Releases(home).alone(), pytest.raises(BackendError, match="another release is being activated; wait"):
        activate(box(home), "2")
    activate(box(home), "2")  # and the lock is open again


@pytest.mark.parametrize("bundle", ["current/bundle", "mine"])
def test_the_bundle_that_will_serve_is_tested(home: Path, bundle: str) -> None:
    """One of the operator's own, or the new release's: not the one of the release before."""
    said: list[str] = []
    made = box(home, said)
    made.config.write_text(f'bundle = "{bundle}"')  # relative to the file, as everywhere
    install(home, "1")
    activate(made, "1")
    wanted = home / ("mine" if bundle == "mine" else "releases/1/bundle")
    assert f"  edge selftest --bundle {wanted}" in said


@pytest.mark.parametrize("text", ["no toml", "", "bundle = 1", None])
def test_a_configuration_that_cannot_be_read_is_left_to_the_check(home: Path, text: str | None) -> None:
    said: list[str] = []
    made = box(home, said)
    made.config.unlink()
    if text is not None:
        made.config.write_text(text)
    install(home, "1", fails={"check": 78})
    with pytest.raises(ConfigError, match="check failed"):
        activate(made, "1")


@pytest.mark.parametrize(
    ("gpu", "manifest", "built"),
    [
        (True, '{"engine": {"max_people": 8}}', True),
        (False, '{"engine": {"max_people": 8}}', False),
        (True, '{"engine": null}', False),
        (True, "{}", False),
        (True, "[]", False),
        (True, "no json", False),
        (True, None, False),
    ],
)
def test_engines_are_built_where_they_can_be(home: Path, gpu: bool, manifest: str | None, built: bool) -> None:
    said: list[str] = []
    folder = install(home, "1")
    if manifest is not None:
        (folder / "bundle/manifest.json").write_text(manifest)
    activate(box(home, said, gpu=gpu), "1")
    assert (f"  python -m export engines {folder}/bundle" in said) == built


def test_engines_are_for_the_service_to_read_however_strict_root_is(home: Path) -> None:
    said: list[str] = []
    (install(home, "1") / "bundle/manifest.json").write_text('{"engine": {"max_people": 8}}')
    before = os.umask(0o077)
    try:
        activate(box(home, said, gpu=True), "1")
    finally:
        os.umask(before)
    assert "  umask 0022" in said


def test_the_newest_three_are_kept(home: Path) -> None:
    serving(home, "1", "2", "3", "4", "5")
    assert Releases(home).all() == ["5", "4", "3"]


def test_what_a_link_names_is_kept_however_old(home: Path) -> None:
    unit = serving(home, "1", "2")
    for age, name in enumerate(("5", "4", "3")):
        install(home, name, age=age)
    rollback(box(home, unit=unit))
    assert Releases(home).all() == ["5", "2", "1"]
    assert links(home) == {"current": "1", "previous": "2"}


# --- killed at any moment ---------------------------------------------------------------------------------------------

KILLED = """
import sys
import tempfile
from pathlib import Path
from edge.activate import activate
from tests.box_releases import box
activate(box(Path(sys.argv[1])), "new")
"""
# what serves after a restart of the machine, killed there
AFTER = {
    "release.link-made": "old",
    "release.link-made:2": "old",
    "release.on-trial": "old",
    "release.switched": "old",
    "release.confirmed": "new",
    "release.gone": "new",
    "release.gone:2": "new",
}
AFTER_FAILURE = {**dict.fromkeys(AFTER, "old"), "release.back": "old"}
CASES = [(point, True, serves) for point, serves in AFTER.items()]
CASES += [(point, False, AFTER_FAILURE[point]) for point in ("release.switched", "release.back")]


def test_every_fail_point_is_here() -> None:
    assert {point.partition(":")[0] for point, _, _ in CASES} == RELEASES


def killed_activation(home: Path, point: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(home)],
        cwd=ROOT,
        env={**os.environ, "LOOKOUT_FAILPOINT": point},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(("point", "ready", "serves"), CASES)
def test_killed_between_any_two_steps(home: Path, point: str, ready: bool, serves: str) -> None:
    serving(home, "a", "b", "older", "old")
    install(home, "c", age=2000)
    install(home, "new", ready=ready)
    before = links(home)
    killed_activation(home, point)

    seen = Releases(home)
    assert seen.current in {"old", "new"}  # whole, at every moment
    before_start(home)
    assert seen.current == serves
    assert not (home / "trial").is_symlink()
    assert links(home) == (before if serves == "old" else {"current": "new", "previous": "old"})

    # and the next one goes on from there
    made = box(home)
    (home / "releases/new/never-ready").unlink(missing_ok=True)
    activate(made, "new")
    assert links(home)["current"] == "new"
    assert not list((home / "releases").glob(".*"))
    assert len(seen.all()) == 3


@pytest.mark.parametrize("point", ["release.on-trial", "release.switched"])
def test_the_next_activation_first_goes_back(home: Path, point: str) -> None:
    """Without a restart in between: nobody watched the release on trial, so it is not what the next one returns to."""
    serving(home, "older", "old")
    install(home, "new")
    killed_activation(home, point)
    install(home, "newer", ready=False)
    unit, said = Unit(home), list[str]()
    with pytest.raises(BackendError):
        activate(box(home, said, unit=unit), "newer")
    assert any("an activation before this one was cut off" in line for line in said)
    assert unit.ran == ["old", "newer", "old"]
    assert links(home) == {"current": "old", "previous": "older"}


UNIT = ROOT / "appliance/lookout.service"


def before_start(home: Path) -> None:
    """What the unit does before each start."""
    (line,) = re.findall(r"^ExecStartPre=\+/bin/sh -c '(.*)'$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    done = subprocess.run(["/bin/sh", "-c", line.replace("/opt/lookout", str(home))], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_start_leaves_alone_what_is_being_watched(home: Path) -> None:
    serving(home, "1", "2")
    before_start(home)
    assert links(home) == {"current": "2", "previous": "1"}
    install(home, "3")
    releases = Releases(home)
    with releases.alone():
        releases.begin("3")
        before_start(home)  # as by the restart of `edge activate` itself
        assert links(home) == {"current": "3", "previous": "1", "trial": "2"}
    before_start(home)  # and as after its death
    assert links(home) == {"current": "2", "previous": "1"}


# --- any order --------------------------------------------------------------------------------------------------------

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of syncs, none of which has to be one
KINDS = ("good", "never-ready", "selftest", "check")


class AnyOrder(RuleBasedStateMachine):
    """Installations, activations, rollbacks and deaths in any order, beside a model of two names."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.home = Path(self._folder.name)
        self.unit = Unit(self.home)
        self.kinds: dict[str, str] = {}
        self.current: str | None = None
        self.previous: str | None = None

    def teardown(self) -> None:
        self._folder.cleanup()

    @rule(kind=st.sampled_from(KINDS))
    def installed(self, kind: str) -> None:
        name = f"r{len(self.kinds)}"
        fails = {kind: 72} if kind in ("selftest", "check") else {}
        install(self.home, name, ready=kind != "never-ready", fails=fails, age=1000 - len(self.kinds))
        self.kinds[name] = kind

    def here(self) -> list[str]:
        return sorted(Releases(self.home).all())

    @precondition(lambda self: self.here())
    @rule(data=st.data())
    def activated(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.here()))
        self._turned_to(name, lambda: activate(box(self.home, unit=self.unit), name))

    @precondition(lambda self: self.previous)
    @rule()
    def rolled_back(self) -> None:
        assert self.previous is not None
        self._turned_to(self.previous, lambda: rollback(box(self.home, unit=self.unit)))

    def _turned_to(self, name: str, change: object) -> None:
        assert callable(change)
        if self.kinds[name] == "good":
            change()
            if name != self.current:
                self.previous = self.current if self.current is not None else self.previous
                self.current = name
        else:
            with pytest.raises(LookoutError):
                change()

    @precondition(lambda self: self.here())
    @rule(data=st.data(), booted=st.booleans())
    def died_on_trial(self, data: st.DataObject, booted: bool) -> None:
        name = data.draw(st.sampled_from(self.here()))
        if self.current is None or self.kinds[name] != "good":
            return
        releases = Releases(self.home)
        with releases.alone():
            releases.begin(name)
        if booted:
            before_start(self.home)
        else:
            activate(box(self.home, unit=self.unit), self.current)

    @invariant()
    def current_is_whole_and_previous_right(self) -> None:
        found = links(self.home)
        wanted = {"current": self.current, "previous": self.previous}
        assert found == {link: name for link, name in wanted.items() if name is not None}
        assert set(found.values()) <= set(self.here())
        assert self.current is None or self.kinds[self.current] == "good"
        assert self.unit.ran[-1:] in ([], [self.current])


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


@settings(max_examples=30)
@given(ages=st.lists(st.integers(0, 5), max_size=7), current=st.integers(0, 6), previous=st.integers(0, 6))
def test_prune_keeps_three_and_what_is_named(
    tmp_path_factory: pytest.TempPathFactory, ages: list[int], current: int, previous: int
) -> None:
    home = tmp_path_factory.mktemp("opt")
    for number, age in enumerate(ages):
        install(home, str(number), age=age)
    for link, number in (("current", current), ("previous", previous)):
        if number < len(ages):
            (home / link).symlink_to(f"releases/{number}")
    releases = Releases(home)
    before = releases.all()
    gone = releases.prune()
    assert sorted([*gone, *releases.all()]) == sorted(before)
    assert len(releases.all()) == min(3, len(before))
    assert set(links(home).values()) <= set(releases.all())
    assert releases.prune() == []
