"""The picture of the house, drawn again from the imports: which way they point, and where the heavy ones are."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mnist_dist"
# ground floor <- store <- images <- sources <- data <- models <- engines <- training, tuning, scoring <- evaluation
# <- on_ray <- commands <- api, jobs, benchmarks
FLOORS = {
    **dict.fromkeys(("errors", "urls", "config", "distributions", "search_config", "recipes", "flags", "console"), 0),
    **dict.fromkeys(("command_help", "command_line", "environment", "side_thread", "processor", "keywords"), 0),
    "score_config": 0,
    "documents": 1,
    "store": 2,
    **dict.fromkeys(("session", "inventory", "evaluate_config", "export_config", "import_config", "doctor_config"), 3),
    **dict.fromkeys(("combine_config", "report_config"), 3),
    "images": 4,
    "sources": 5,
    "data": 6,
    "models": 7,
    "engines": 8,
    **dict.fromkeys(("combining", "importing", "training", "tuning", "scoring"), 9),
    "evaluation": 10,
    "on_ray": 11,
    **dict.fromkeys(("commands", "results"), 12),
    **dict.fromkeys(("api", "jobs", "benchmarks", "__main__"), 13),
}
TENSORFLOW = {
    f"{PACKAGE}.engines.engine",
    f"{PACKAGE}.engines.formats",
    f"{PACKAGE}.engines.graphs",
    f"{PACKAGE}.importing.saved_models",
    f"{PACKAGE}.importing.tensorflow_images",
    f"{PACKAGE}.on_ray.training.backend",
    f"{PACKAGE}.training.precision",
    f"{PACKAGE}.training.tensorflow_step",
    "benchmarks.feed",
    "benchmarks.peers.compute",
    "benchmarks.train",
    "benchmarks.peers.model",
    "benchmarks.peers.race_networks",
    "benchmarks.peers.tf_data",
}
JAX = {
    f"{PACKAGE}.engines.engine",
    f"{PACKAGE}.on_ray.training.backend",
    f"{PACKAGE}.training.jax_step",
    f"{PACKAGE}.training.precision",
    "benchmarks.feed",
    "benchmarks.peers.compute",
}
RAY_OF_PEERS = {f"benchmarks.peers.{name}" for name in ("onnx_ray", "race_ray_tune", "ray_recipe", "start")}
"""What is measured beside us, written as its own users would."""
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported module; `lazy`: inside a function, or for types only."""

    name: str
    lazy: bool


def name_of(path: Path) -> str:
    """`mnist_dist.images.decoder` of `mnist_dist/images/decoder.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    name_of(path): ast.parse(path.read_text())
    for folder in (PACKAGE, "jobs", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(tree: ast.Module) -> Iterator[Import]:
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        lazy = id(node) not in at_once
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            for alias in node.names:  # `from package import module` imports the module
                whole = f"{module}.{alias.name}"
                yield Import(whole if whole in TREES else module, lazy)


IMPORTS = {module: list(imports_of(tree)) for module, tree in TREES.items()}
MODULES = pytest.mark.parametrize("module", list(TREES))
PACKAGES = sorted({module.rpartition(".")[0] for module in TREES if module.startswith(f"{PACKAGE}.")} - {PACKAGE})
NO_MODULES = {"keras", "program"}
"""Backquoted in the docstring of a package: an outside package, a parameter."""


def part_of(module: str) -> str:
    """The part of the house: `data` of `mnist_dist.images.decoder`, `jobs` of `jobs.train`; empty: the front door."""
    names = module.split(".")
    return names[0] if names[0] != PACKAGE else names[1] if len(names) > 1 else ""


def own(imports: list[Import]) -> list[Import]:
    return [found for found in imports if found.name.split(".")[0] in (PACKAGE, "jobs", "benchmarks")]


def importers(package: str, *, lazy: bool = True) -> set[str]:
    """The modules that import an outside package or a module of it."""
    return {
        module
        for module, imports in IMPORTS.items()
        for found in imports
        if found.name.split(".")[0] == package and (lazy or not found.lazy)
    }


def test_every_part_of_the_house_is_in_the_picture() -> None:
    assert {part_of(module) for module in TREES} - {""} <= FLOORS.keys()
    assert len(TREES) > 30


@MODULES
def test_imports_point_one_way(module: str) -> None:
    floor = FLOORS.get(part_of(module), -1)
    for found in own(IMPORTS[module]):
        part = part_of(found.name)
        if part == "":
            continue  # the package itself: its version
        if module == PACKAGE:
            assert found.lazy, f"{module} imports {found.name} at once"
        else:
            beside = FLOORS[part] == floor and (floor == 0 or part == part_of(module))
            assert FLOORS[part] < floor or beside, f"{module} imports {found.name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {found.name for found in own(imports) if found.name != PACKAGE} for module, imports in IMPORTS.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        pytest.fail(" -> ".join(err.args[1]))


def test_nobody_imports_jobs() -> None:
    assert importers("jobs") <= {"jobs"}


def test_ray_is_imported_on_ray_alone() -> None:
    assert {part_of(module) for module in importers("ray") - RAY_OF_PEERS} == {"on_ray"}


@MODULES
def test_benchmarks_and_jobs_load_ray_when_they_begin_to_work(module: str) -> None:
    if FLOORS.get(part_of(module), 0) > FLOORS["on_ray"]:
        assert all(found.lazy for found in own(IMPORTS[module]) if part_of(found.name) == "on_ray")


def test_no_scheme_is_tested_for_outside_of_the_stores() -> None:
    schemes = {"s3://", "file://", "gs://", "az://", "https://", "s3:/"}
    constants = {
        module: {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for module, tree in TREES.items()
        if not module.startswith(f"{PACKAGE}.store") and part_of(module) != "benchmarks"
    }
    assert {module: found & schemes for module, found in constants.items() if found & schemes} == {}


def test_tensorflow_is_imported_where_the_picture_says() -> None:
    assert importers("tensorflow") == TENSORFLOW
    assert importers("jax") == JAX


def test_data_and_the_ground_floor_load_neither_tensorflow_nor_keras() -> None:
    heavy = importers("tensorflow", lazy=False) | importers("keras", lazy=False) | importers("ray", lazy=False)
    assert {module for module in heavy if FLOORS.get(part_of(module), 0) <= FLOORS["data"]} == set()


@MODULES
def test_a_module_is_named_after_what_it_owns(module: str) -> None:
    assert not set(module.split(".")) & SAYS_NOTHING
    assert not module.endswith(("_utils", "_helpers", "_manager"))


@MODULES
def test_a_module_says_what_it_owns(module: str) -> None:
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_docstring_names_modules_that_exist(package: str) -> None:
    names = set(re.findall(r"`([a-z_0-9]+)(?:\.\w+)*`", ast.get_docstring(TREES[package]) or "")) - NO_MODULES
    assert {name for name in names if not {f"{package}.{name}", f"{PACKAGE}.{name}"} & TREES.keys()} == set()


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md"))])
def test_a_page_links_to_files_and_tests_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for label, target in re.findall(r"\[([^\]]+)\]\(([^)#:]+)\)", text):
        linked = (ROOT / page).parent / target
        assert linked.exists(), f"{page} links to {target}"
        if label.startswith("`test_"):
            assert f"def {label.strip('`')}(" in linked.read_text(), f"{page} names {label}, which is not in {target}"
