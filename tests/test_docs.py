"""Documentation that can be executed is executed: links, commands, examples and tables are held against the code."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel

import appliance.cli
import collector.cli
import edge.cli
import export.cli
from collector.store import Store
from edge.commands import INTERRUPTED, IO_ERROR
from edge.config import CameraConfig, EdgeConfig, Settings, ZoneConfig, read_edge_config
from edge.errors import LookoutError
from export.label_map import read_label_map
from export.prompts import read_prompts
from export.recipe import DetectorRecipe, EncoderRecipe, EngineRecipe, Recipe, read_recipe
from tests.test_layers import (
    APPLIANCE,
    COLLECTOR,
    CONTRACTS,
    DELIVERY,
    DEVICES,
    DOCTOR,
    EDGE,
    EXPORT,
    PACKAGES,
    PIXELS,
    SOURCES,
    STAGES,
    WORDS,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
MADE = {".venv", "out", "build", "dist"}  # folders that hold no documentation of this project
DOCS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("engines/*.md"),
        *(
            doc
            for top in ROOT.iterdir()
            if top.is_dir() and top.name[0] != "." and top.name not in MADE | {"engines"}
            for doc in top.rglob("*.md")
        ),
    ]
)
PROGRAMS: dict[str, click.Group] = {
    "edge": edge.cli.main,
    "collector": collector.cli.main,
    "python -m export": export.cli.main,
    "python -m appliance": appliance.cli.main,
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)

# What is checked word by word and not run: why
NOT_RUN = {
    "make": "a whole build, test run or bench",
    "source": "changes a shell",
    "python -m pytest": "this is one",
    "curl": "asks what runs",
    "python -m pip": "downloads",
    "python -m appliance image": "downloads",
    "python -m appliance flash": "needs boxes",
    "python -m export sample": "may download",
    "python -m export engines": "needs a GPU and TensorRT",
    "edge activate": "changes the releases of a box",
    "edge rollback": "changes the releases of a box",
    "collector run": "waits for boxes",
    "python -m export evaluate": "needs labelled people",
    "python -m export calibrate": "needs labelled people",
    "python -m export adapt": "needs labelled people",
}


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its first line of text, from 1."""

    doc: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.doc.relative_to(ROOT)}:{self.line}"


def parts_of(doc: Path) -> tuple[list[Block], str]:
    """The fenced blocks of a document, dedented, and its text without them."""
    blocks, prose, fence = [], [], None
    for number, line in enumerate(doc.read_text(encoding="utf-8").splitlines(), 1):
        if (found := re.match(r"( *)```(\w*)$", line)) is None:
            (prose if fence is None else fence[3]).append(line)
        elif fence is None:
            fence = (len(found[1]), number + 1, found[2], list[str]())
        else:
            indent, start, language, lines = fence
            blocks.append(Block(doc, start, language, "\n".join(text[indent:] for text in lines)))
            fence = None
    assert fence is None, f"{doc}: a fence is never closed"
    return blocks, "\n".join(prose)


BLOCKS = [block for doc in DOCS for block in parts_of(doc)[0]]
PROSE = {doc: parts_of(doc)[1] for doc in DOCS}


@dataclass(frozen=True)
class Shown:
    """One command of a document, and what the document shows of its output ("" where it shows none)."""

    place: str
    command: str
    output: str = ""


def commands_of(block: Block) -> Iterator[Shown]:
    """Every line of a `sh` block; what follows `$ ` in a `console` block, with its output."""
    if block.language == "sh":
        for number, line in enumerate(block.text.splitlines()):
            if line.split("#")[0].strip():
                yield Shown(f"{block.doc.relative_to(ROOT)}:{block.line + number}", line)
    if block.language == "console":
        for text in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, output = text.partition("\n")
            yield Shown(str(block), command, output)


SHOWN = [shown for block in BLOCKS for shown in commands_of(block)]
INLINE = [
    Shown(str(doc.relative_to(ROOT)), code)
    for doc in DOCS
    for code in re.findall(r"`([^`\n]+)`", PROSE[doc])
    if re.match(r"(make|edge|collector|python -m export|python -m appliance) ", code)
]


def words_of(command: str) -> tuple[dict[str, str], str, list[str]]:
    """Variables before the command, the program ("python -m export" is one), and the words after it."""
    words, variables = shlex.split(command, comments=True), {}
    while found := re.fullmatch(r"([A-Z_]+)=(.*)", words[0]):
        variables[found[1]] = found[2]
        words.pop(0)
    length = 3 if words[:2] == ["python", "-m"] else 1
    return variables, " ".join(words[:length]), words[length:]


def ids(values: list[Any]) -> list[str]:
    return [getattr(value, "place", None) or str(value) for value in values]


# --- links ------------------------------------------------------------------------------------------------------------


def anchors_of(doc: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, a hyphen per space."""
    headings = re.findall(r"^#+ (.+)$", PROSE[doc], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(doc: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", PROSE[doc]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (doc.parent / path).resolve() if path else doc
        assert place.exists(), f"{target}: no such file"
        assert place.is_relative_to(ROOT), f"{target}: outside the repository"
        if anchor:
            assert anchor in anchors_of(place), f"{target}: no such heading"


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_files_named_in_passing_exist(doc: Path) -> None:
    for path in re.findall(r"`((?:edge|export|collector|configs|prompts|tests|docs)/[\w./*-]*)`", PROSE[doc]):
        assert list(ROOT.glob(path.rstrip("/"))), f"{path}: no such file"


def test_every_alarm_says_what_to_do() -> None:
    alarms = re.findall(r"alert: (\w+)", (ROOT / "configs/alerts-lookout.yml").read_text(encoding="utf-8"))
    told = re.findall(r"^### (Lookout\w+)$", PROSE[ROOT / "docs/operations.md"], re.MULTILINE)
    assert sorted(told) == sorted(alarms)


def test_the_readme_shows_a_picture() -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PROSE[ROOT / "README.md"])
    assert 50_000 < (ROOT / picture).stat().st_size < 1_200_000


# --- commands ---------------------------------------------------------------------------------------------------------


def test_every_block_is_of_a_language_that_is_checked() -> None:
    assert not [str(block) for block in BLOCKS if block.language not in ("sh", "console", "toml", "text")]
    assert len(SHOWN) > 20
    assert len(INLINE) > 10


def make_faults(words: list[str], variables: dict[str, str]) -> Iterator[str]:
    for word in words:
        name = word.partition("=")[0]
        if "=" in word:
            if f"$({name})" not in MAKEFILE and f"$(if $({name})" not in MAKEFILE:
                yield f"the Makefile knows no variable {name}"
        elif word not in TARGETS:
            yield f"the Makefile has no target {word}"
    code = (ROOT / "export/cli.py").read_text(encoding="utf-8")
    yield from (f"nothing reads {name}" for name in variables if f'"{name}"' not in code)


@pytest.mark.parametrize("shown", SHOWN, ids=ids(SHOWN))
def test_command_is_one_that_its_program_takes(shown: Shown) -> None:
    variables, program, words = words_of(shown.command)
    if program in PROGRAMS:
        # click's own parser: an unknown command or option, a missing or superfluous word, a bad value all raise
        with PROGRAMS[program].make_context(program, list(words)) as context:
            name, command, rest = PROGRAMS[program].resolve_command(context, words)
            assert command is not None
            command.make_context(name, list(rest), parent=context)
    elif program == "make":
        assert not list(make_faults(words, variables))
    elif program == "curl":
        assert all(re.fullmatch(r"http://127\.0\.0\.1:947[78]/(livez|readyz|status|metrics)", word) for word in words)
    elif program == "python -m pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-"))
    else:
        assert (program, words[:1]) in [("source", [".venv/bin/activate"]), ("python -m pip", ["install"])]


@pytest.mark.parametrize("shown", INLINE, ids=[f"{shown.place}: {shown.command}" for shown in INLINE])
def test_command_named_in_passing_exists(shown: Shown) -> None:
    _, program, words = words_of(shown.command)
    if program == "make":
        assert not list(make_faults(words, {}))
        return
    group = PROGRAMS[program]
    command = group if words[0].startswith("--") else group.commands[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the documents' commands run as they stand, at little cost.

    engines/mini is built by the documents' own command. Placeholders: engines/full is a copy of it; the camera of
    configs/edge.toml is a folder with one picture, and its collector an address where nobody listens; lookout.db
    is an empty store.
    """
    folder = tmp_path_factory.mktemp("project")
    for name in ("configs", "prompts"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "export").symlink_to(ROOT / "export")
    with Store(folder / "lookout.db", create=True):
        pass
    config = folder / "configs/edge.toml"
    text = re.sub(r'^source = "[^"]+"', 'source = "../export/mini"', config.read_text(), flags=re.MULTILINE)
    text = text.replace("tcp://127.0.0.1:5577", "ipc://out/nobody").replace("linger_ms = 2000", "linger_ms = 0")
    text = text.replace('"127.0.0.1:9477"', '""')  # another box may tell there how it is
    config.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("python -m export build configs/models-mini.toml").exit_code == 0
    shutil.copytree(folder / "engines/mini", folder / "engines/full")
    return folder


def run(command: str) -> Result:
    """Run one of the command lines in this process, as its console script would."""
    _, program, words = words_of(command)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return CliRunner().invoke(PROGRAMS[program], words, prog_name=program, catch_exceptions=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_run(shown: Shown) -> bool:
    _, program, words = words_of(shown.command)
    return not {program, f"{program} {words[0]}"} & set(NOT_RUN)


RUN = [shown for shown in SHOWN if is_run(shown)]


@pytest.mark.parametrize("shown", RUN, ids=ids(RUN))
def test_command_runs_and_says_what_is_shown(shown: Shown, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    result = run(shown.command)
    assert result.exit_code == 0, result.output
    if shown.output:
        assert alike(result.output, shown.output), result.output


def alike(said: str, shown: str) -> bool:
    """Equal text; numbers to within 1, as CPUs round differently; a line "…" stands for any lines."""
    number = r"\d+(?:\.\d+)?"
    texts = [re.escape(text) for text in re.split(number, shown.strip())]
    found = re.fullmatch(f"({number})".join(texts).replace("…", r"[\s\S]*"), said.strip())
    wanted = re.findall(number, shown)
    return found is not None and all(abs(float(a) - float(b)) <= 1 for a, b in zip(found.groups(), wanted, strict=True))


def test_most_commands_are_run() -> None:
    run_by = {" ".join([words_of(shown.command)[1], words_of(shown.command)[2][0]]) for shown in RUN}
    left = {f"{program} {name}" for program, group in PROGRAMS.items() for name in group.commands} - run_by
    assert left == {*NOT_RUN, "collector deny"} - {"make", "source", "curl", "python -m pytest", "python -m pip"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_console_script_helps(program: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    modules = {"python -m export", "python -m appliance"}
    assert set(scripts) == set(PROGRAMS) - modules
    words = [str(Path(sys.executable).parent / program)]
    if program in modules:
        words = [sys.executable, *program.split()[1:]]
    done = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {program} ")


# --- nothing is left out, nothing is made up --------------------------------------------------------------------------


def test_every_command_and_target_is_told() -> None:
    told = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "ARCHITECTURE.md"))
    commands = [f"{program} {name}" for program, group in PROGRAMS.items() for name in group.commands]
    commands += [f"make {target}" for target in TARGETS]
    assert not [command for command in commands if not re.search(rf"\b{command}\b", told)]


def test_the_house_is_the_one_that_stands() -> None:
    (house,) = (block.text for block in BLOCKS if block.text.startswith("edge/"))
    named: dict[str, set[str]] = {}
    folder = ""
    for line in house.splitlines():
        name = line.split()[0]
        if line[0] != " ":
            folder = name.rstrip("/")
            named[folder] = set()
        else:
            assert name not in named[folder], f"{folder}/{name} twice"
            named[folder].add(name.rstrip("/"))
    for folder, names in named.items():
        here = {path.name for path in (ROOT / folder).iterdir() if path.name[0] != "."} - {"__init__.py", "__pycache__"}
        assert names == here, folder
    assert set(named) == set(PACKAGES)


def rows_of(doc: str, head: str) -> list[list[str]]:
    """The cells of the table that begins with this head."""
    text = (ROOT / doc).read_text(encoding="utf-8")
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_import_table_is_the_rule_that_is_held() -> None:
    groups = {
        "words": WORDS, "contracts": CONTRACTS, "delivery": DELIVERY, "devices": DEVICES, "stages": STAGES,
            "pixels": PIXELS, "doctor": DOCTOR, "sources": SOURCES,
        "nothing": frozenset[str](),
    }  # fmt: skip
    here = {path.stem for path in (ROOT / "edge").glob("*.py")} - {"__init__"}
    table: dict[str, set[str]] = {}
    for layer, files, may in rows_of("ARCHITECTURE.md", "layer | files"):
        allowed = set(re.findall(r"`(\w+)`", may))
        for word in re.findall(r"\w+", re.sub(r"`\w+`", "", may)):
            allowed |= groups[word]
        for file in re.findall(r"`(\w+)`", files) or [layer.strip("`")]:
            assert file not in table, file
            table[file] = allowed & here
    rule = {
        **{name: EDGE[name] for name in here},
        "export/*": EXPORT,
        "collector/*": COLLECTOR,
        "appliance/*": APPLIANCE,
    }
    assert table == {name: set(allowed) & here for name, allowed in rule.items()}


def test_exit_codes_are_those_of_the_code() -> None:
    table = {int(code): set(re.findall(r"[\w/]+", error)) for code, error, _ in rows_of("README.md", "code | error")}
    codes: dict[int, set[str]] = {0: set(), click.UsageError.exit_code: {"usage"}, INTERRUPTED: {"interrupt"}}
    for error in LookoutError.__subclasses__():
        codes.setdefault(error.exit_code, set()).add(error.__name__)
    codes[IO_ERROR].add("I/O")
    assert table == codes


def test_figures_are_the_cards() -> None:
    cards = "".join(card.read_text(encoding="utf-8") for card in ROOT.glob("export/mini/*.card.md"))
    known = set(re.findall(r"\b0\.\d{3}\b", cards))
    for name in ("README.md", "MODEL_CARD.md"):
        figures = set(re.findall(r"\b0\.\d{3}\b", PROSE[ROOT / name]))
        assert figures
        assert figures <= known, name


def test_newest_change_is_of_this_version() -> None:
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", PROSE[ROOT / "CHANGELOG.md"], re.MULTILINE)
    assert newest
    assert newest[1] == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


# --- TOML -------------------------------------------------------------------------------------------------------------

EXAMPLES = [block for block in BLOCKS if block.language == "toml"]
READERS = {
    "edge": read_edge_config,
    "demo": read_edge_config,
    "models": read_recipe,
    "labels": partial(read_label_map, categories=()),
    "person": read_prompts,
}
FILES = [path for folder in ("configs", "prompts") for path in sorted((ROOT / folder).glob("*.toml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_file_is_read(path: Path) -> None:
    READERS[path.stem.partition("-")[0]](path)


@pytest.mark.parametrize("block", EXAMPLES, ids=ids(EXAMPLES))
def test_example_is_read_by_its_model(block: Block, tmp_path: Path) -> None:
    """A part of a configuration or recipe takes the place of the same part of the shipped file."""
    keys = set(tomllib.loads(block.text))
    if keys & {"category", "look"}:
        words = (ROOT / "prompts/person-mini.toml").read_text(encoding="utf-8") if "category" not in keys else ""
        (tmp_path / "words.toml").write_text(block.text + "\n" + words, encoding="utf-8")
        read_prompts(tmp_path / "words.toml")
        return
    models: list[tuple[str, type[Settings]]] = [("edge.toml", EdgeConfig), ("models-mini.toml", Recipe)]
    ((name, model),) = [(name, model) for name, model in models if keys <= set(model.model_fields)]
    whole = tomllib.loads((ROOT / "configs" / name).read_text(encoding="utf-8"))
    model.model_validate({**whole, **tomllib.loads(block.text)})


def table_of(model: type[BaseModel]) -> str:
    """What configs/README.md says of a model: its keys, defaults and descriptions as the code has them."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue  # a table of its own
        default = (
            "needed" if field.is_required() else "none" if field.default is None else f"`{toml_of(field.default)}`"
        )
        if name == "classes":
            default = "COCO's 80"
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        meaning = "; ".join(filter(None, [" or ".join(choices) if len(choices) > 1 else "", field.description]))
        lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines)


def toml_of(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_of, value))}]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value).lower()


TABLES: dict[str, type[BaseModel]] = {
    "the top": EdgeConfig,
    "[[camera]]": CameraConfig,
    "[[camera.zone]]": ZoneConfig,
    **{
        f"[{name}]": type(field.default)
        for name, field in EdgeConfig.model_fields.items()
        if isinstance(field.default, BaseModel)
    },
    "a recipe": Recipe,
    "[detector]": DetectorRecipe,
    "[encoder]": EncoderRecipe,
    "[engine]": EngineRecipe,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_key_is_told_as_the_code_has_it(name: str) -> None:
    assert table_of(TABLES[name]) in PROSE[ROOT / "configs/README.md"], f"say of {name}:\n{table_of(TABLES[name])}"
