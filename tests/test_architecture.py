"""The table in docs/architecture.md matches the code: no room imports another that it may not."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
AGAINST = {"jaxlinear/models/loading.py"}  # as the page says


def rooms() -> dict[str, tuple[str, set[str]]]:
    """Maps the path of each room to its row's first path and to what that row allows it to import."""
    found = {}
    for line in PAGE.read_text().split("\n"):
        if line.startswith("| `jaxlinear/"):
            names, _, allowed = (cell.strip() for cell in line.strip("|").split("|"))
            paths = [f"jaxlinear/{name.removeprefix('jaxlinear/')}" for name in re.findall(r"`([^`]+)`", names)]
            for path in paths:
                found[path] = paths[0], {name for name in allowed.split(", ") if name}
    return found


def room_of(path: str) -> str:
    """The longest path in the table that is, or contains, this one; empty if there is none."""
    fitting = [room for room in rooms() if path == room or (room.endswith("/") and path.startswith(room))]
    return max(fitting, key=len, default="")


def reached(room: str) -> set[str]:
    """The first paths of the rows that a room may import, directly or through others."""
    table = rooms()
    small = table["jaxlinear/errors.py"][0]
    seen, waiting = {small}, [table[room][0]]
    while waiting:
        first = waiting.pop()
        if first in seen:
            continue
        seen.add(first)
        for name in table[first][1]:
            path = f"jaxlinear/{name}/" if f"jaxlinear/{name}/" in table else f"jaxlinear/{name}.py"
            waiting.append(table[path][0])
    return seen


def imported(file: Path) -> set[str]:
    """The files and folders of this package that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    found = set()
    for parts in (name.split(".") for name in names if name.startswith("jaxlinear.")):
        while not (ROOT.joinpath(*parts).is_dir() or ROOT.joinpath(*parts).with_suffix(".py").is_file()):
            parts = parts[:-1]
        path = ROOT.joinpath(*parts)
        found.add("/".join(parts) + ("/" if path.is_dir() else ".py"))
    return found - {"jaxlinear/"}  # the package itself, for its version


FILES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "jaxlinear").rglob("*.py"))]


def test_every_file_is_in_a_room():
    assert [name for name in FILES if name != "jaxlinear/__init__.py" and not room_of(name)] == []


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_it_may(room):
    allowed = reached(room)
    wrong = [
        f"{name} imports {other}"
        for name in FILES
        if name != "jaxlinear/__init__.py" and room_of(name) == room and name not in AGAINST
        for other in sorted(imported(ROOT / name))
        if (other_room := room_of(other)) and rooms()[other_room][0] not in allowed
    ]
    assert wrong == [], f"move what is shared, or say in {PAGE.name} that {room} may import it"


def test_the_file_that_goes_against_the_table_still_does():
    """Otherwise the exception should leave the page and ``AGAINST``."""
    others = {rooms()[room_of(other)][0] for name in AGAINST for other in imported(ROOT / name)}
    assert others - reached("jaxlinear/models/")


def test_no_files_import_each_other_in_a_circle():
    files = {name: {other for other in imported(ROOT / name) if other.endswith(".py")} - {name} for name in FILES}
    graphlib.TopologicalSorter(files).prepare()
