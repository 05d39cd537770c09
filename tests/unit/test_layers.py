"""Imports run one way only: what each part of the code may know of the others, and what the daemon never loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = {"mlxd_client": ROOT / "client/src/mlxd_client", "mlxd": ROOT / "daemon/src/mlxd"}

# What may be imported besides a part's own modules: parts of this code, and packages from elsewhere.
# A part is a top-level module or folder of a package; `mlxd_client` as a whole is one.
STANDS_ON: dict[str, tuple[set[str], set[str]]] = {
    "mlxd_client": (set(), {"msgspec"}),
    "mlxd": (set(), set()),
    "mlxd.stateversion": ({"mlxd_client"}, {"msgspec"}),
    "mlxd.childwire": ({"mlxd_client"}, {"msgspec"}),
    "mlxd.fidelity": (set(), set()),
    "mlxd.wholefiles": (set(), set()),
    "mlxd.redact": (set(), set()),
    "mlxd.logs": ({"mlxd.redact"}, {"msgspec", "structlog"}),
    "mlxd.catalog": ({"mlxd_client"}, {"msgspec"}),
    "mlxd.personas": ({"mlxd_client"}, {"msgspec"}),
    "mlxd.settings": ({"mlxd_client", "mlxd.catalog", "mlxd.measure", "mlxd.personas"}, {"msgspec"}),
    "mlxd.core": ({"mlxd_client"}, {"msgspec"}),
    "mlxd.measure": ({"mlxd_client", "mlxd.core"}, {"psutil"}),
    "mlxd.store": ({"mlxd_client"}, {"msgspec"}),
    "mlxd.promptfiles": ({"mlxd.stateversion", "mlxd.store", "mlxd.wholefiles"}, {"msgspec"}),
    "mlxd.childside": ({"mlxd_client", "mlxd.childwire"}, {"msgspec"}),
    "mlxd.children": (
        {"mlxd_client", "mlxd.childwire", "mlxd.stateversion", "mlxd.wholefiles"}, {"msgspec", "psutil"},
    ),
    "mlxd.worker": (
        {"mlxd_client", "mlxd.childwire", "mlxd.childside", "mlxd.fidelity", "mlxd.promptfiles", "mlxd.store"},
        {"msgspec", "mlx", "mlx_lm", "numpy", "transformers", "tokenizers", "jinja2", "llguidance", "PIL", "jsonschema",
         "referencing"},
    ),
    "mlxd.fetch": (
        {"mlxd_client", "mlxd.childwire", "mlxd.childside", "mlxd.stateversion", "mlxd.store"},
        {"msgspec", "huggingface_hub"},
    ),
    "mlxd.server": ({"mlxd_client", "mlxd.logs"}, {"msgspec", "psutil"}),
    "mlxd.workers": ({"mlxd_client", "mlxd.childwire", "mlxd.children"}, {"msgspec"}),
    "mlxd.generation": ({"mlxd_client", "mlxd.childwire", "mlxd.core", "mlxd.server"}, {"msgspec"}),
    "mlxd.stats": ({"mlxd_client", "mlxd.childwire"}, set()),
    "mlxd.texts": ({"mlxd_client", "mlxd.childwire"}, {"msgspec"}),
    "mlxd.fetchers": ({"mlxd_client", "mlxd.childwire", "mlxd.children"}, {"msgspec"}),
    "mlxd.downloads": (
        {"mlxd_client", "mlxd.childwire", "mlxd.children", "mlxd.core", "mlxd.fetchers", "mlxd.server",
         "mlxd.settings", "mlxd.stateversion", "mlxd.store", "mlxd.wholefiles"},
        {"msgspec"},
    ),
    "mlxd.library": (
        {"mlxd_client", "mlxd.catalog", "mlxd.core", "mlxd.downloads", "mlxd.fetchers", "mlxd.server",
         "mlxd.settings", "mlxd.store"},
        set(),
    ),
    "mlxd.prompts": (
        {"mlxd_client", "mlxd.childwire", "mlxd.promptfiles", "mlxd.server", "mlxd.settings", "mlxd.workers"},
        {"msgspec"},
    ),
    "mlxd.batch": ({"mlxd_client"}, {"msgspec"}),
    "mlxd.runtime": (
        {"mlxd_client", "mlxd.batch", "mlxd.childwire", "mlxd.children", "mlxd.core", "mlxd.fetchers",
         "mlxd.generation", "mlxd.library", "mlxd.logs", "mlxd.measure", "mlxd.personas", "mlxd.prompts",
         "mlxd.server", "mlxd.settings", "mlxd.stateversion", "mlxd.stats", "mlxd.store", "mlxd.texts", "mlxd.workers"},
        {"msgspec", "psutil"},
    ),
    "mlxd.lean": (set(), {"uvloop"}),
    "mlxd.notify": (set(), set()),
    "mlxd.versions": (set(), set()),
    "mlxd.sidecar": (set(), set()),
    "mlxd.service": (
        {"mlxd_client", "mlxd.notify", "mlxd.settings", "mlxd.server", "mlxd.wholefiles"}, {"msgspec"},
    ),
    "mlxd.handover": ({"mlxd_client", "mlxd.server", "mlxd.wholefiles"}, {"msgspec"}),
    "mlxd.succession": (
        {"mlxd_client", "mlxd.children", "mlxd.handover", "mlxd.notify", "mlxd.runtime", "mlxd.server",
         "mlxd.settings"}, set(),
    ),
    "mlxd.tomledit": (set(), {"tomlkit"}),
    "mlxd.configfile": ({"mlxd.settings", "mlxd.tomledit", "mlxd.wholefiles"}, set()),
    "mlxd.configuration": ({"mlxd_client", "mlxd.configfile", "mlxd.logs", "mlxd.settings"}, {"msgspec"}),
    "mlxd.live": ({"mlxd.children", "mlxd.logs", "mlxd.runtime", "mlxd.server", "mlxd.settings"}, set()),
    "mlxd.app": (
        {"mlxd.children", "mlxd.configuration", "mlxd.handover", "mlxd.live", "mlxd.logs", "mlxd.notify",
         "mlxd.runtime", "mlxd.server", "mlxd.settings", "mlxd.sidecar", "mlxd.stateversion", "mlxd.store",
         "mlxd.succession", "mlxd_client"},
        {"uvloop", "msgspec"},
    ),
    "mlxd.cli": (
        {"mlxd_client", "mlxd.app", "mlxd.batch", "mlxd.catalog", "mlxd.configuration", "mlxd.handover", "mlxd.lean",
         "mlxd.redact", "mlxd.server", "mlxd.service", "mlxd.settings", "mlxd.sidecar", "mlxd.store", "mlxd.versions"},
        {"msgspec", "psutil", "rich"},
    ),
    "mlxd.__main__": ({"mlxd.cli"}, set()),
}  # fmt: skip

# The core decides; it may not look at the world.
NOT_IN_CORE = {"asyncio", "os", "time", "logging", "threading", "socket", "subprocess", "pathlib", "random", "signal"}


def imports(path: Path, package: str) -> Iterator[str]:
    """Full names of all modules that a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            yield base
            # `from mlxd import app` and `from . import logs` name modules too
            yield from (f"{base}.{alias.name}" for alias in node.names if base in ("mlxd", "mlxd_client"))


def files() -> Iterator[tuple[str, str, Path]]:
    """(part, package, path) of every source file."""
    for name, root in TREES.items():
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            package = ".".join([name, *relative.parent.parts])
            if name == "mlxd_client":
                yield name, package, path
            else:
                yield part_of(".".join([package, path.stem])), package, path


def part_of(module: str) -> str:
    """The part that a module of ours belongs to: `mlxd.server.methods.table` to `mlxd.server`."""
    if module.split(".")[0] == "mlxd_client":
        return "mlxd_client"
    parts = [part for part in module.split(".")[:2] if part != "__init__"]
    root = TREES["mlxd"]
    if len(parts) == 2 and not (root / parts[1]).is_dir() and not (root / f"{parts[1]}.py").exists():
        return "mlxd"  # a name inside mlxd/__init__.py, such as __version__
    return ".".join(parts)


SOURCES = list(files())


@pytest.mark.parametrize("part", sorted({part for part, _, _ in SOURCES}))
def test_imports_run_one_way(part: str) -> None:
    assert part in STANDS_ON, f"{part} is new: say in STANDS_ON what it may import"
    ours, others = STANDS_ON[part]
    for owner, package, path in SOURCES:
        if owner != part:
            continue
        for name in imports(path, package):
            top = name.split(".")[0]
            if top in TREES:
                allowed = part_of(name) in {"mlxd", part, *ours}  # `mlxd` itself holds the version only
            else:
                allowed = top in sys.stdlib_module_names or top in others
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_parts_form_no_circle() -> None:
    graph = {part: ours - {part} for part, (ours, _) in STANDS_ON.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {part for part, needs in graph.items() if part not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def listed_modules(folder: Path) -> list[str]:
    """What the docstring of a package lists, in its order."""
    return re.findall(r"^ {4}(\w+) ", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "", re.M)


@pytest.mark.parametrize("name", ["measure", "runtime", "worker"])
def test_a_package_lists_what_lives_in_it(name: str) -> None:
    folder = TREES["mlxd"] / name
    assert sorted(listed_modules(folder)) == sorted(
        path.stem for path in folder.glob("*.py") if path.stem != "__init__"
    )


def test_each_part_of_the_runtime_knows_only_those_below_it() -> None:
    folder = TREES["mlxd"] / "runtime"
    listed = listed_modules(folder)
    for number, name in enumerate(listed):
        known = {module.rpartition(".")[2] for module in imports(folder / f"{name}.py", "mlxd.runtime")
                 if module.startswith("mlxd.runtime.")}  # fmt: skip
        assert known <= set(listed[number + 1 :]), name


def test_the_core_does_not_look_at_the_world() -> None:
    for part, package, path in SOURCES:
        if part == "mlxd.core":
            tops = {name.split(".")[0] for name in imports(path, package)}
            assert tops.isdisjoint(NOT_IN_CORE), path.name


def test_only_workers_touch_mlx() -> None:
    for part, package, path in SOURCES:
        tops = {name.split(".")[0] for name in imports(path, package)}
        assert part == "mlxd.worker" or tops.isdisjoint(
            {"mlx", "mlx_lm", "mlx_vlm", "transformers", "tokenizers", "PIL"}
        ), path


def test_only_fetchers_ask_the_hub() -> None:
    for part, package, path in SOURCES:
        tops = {name.split(".")[0] for name in imports(path, package)}
        assert part == "mlxd.fetch" or tops.isdisjoint({"huggingface_hub", "hf_xet", "httpx", "httpx2"}), path


def test_the_daemon_loads_nothing_heavy() -> None:
    """Everything that `mlxd serve` imports, and nothing that would cost memory for nothing."""
    script = (
        "import sys; from mlxd.lean import without_openssl; without_openssl(); import mlxd.cli.main, mlxd.settings, "
        "mlxd.app; print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {
        "mlx",
        "mlx_lm",
        "mlx_vlm",
        "PIL",
        "requests",
        "numpy",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "rich",
        "hf_xet",
        "httpx",
        "httpx2",
        "yaml",
        "_ssl",
        "_hashlib",
        "tomlkit",
    }
    assert heavy.isdisjoint(done.stdout.split())
