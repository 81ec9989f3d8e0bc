"""Imports go one way, foreign APIs have one door, and what must start fast imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ["device", "transport", "kv", "model", "engine", "cluster"]
BELOW = {
    "device": set(),
    "transport": {"device"},
    "kv": {"device", "transport"},
    "model": {"device", "transport"},
    "engine": {"device", "transport", "kv", "model"},
    "cluster": {"device", "transport", "kv", "model", "engine"},
}
PURE = {"planning", "measure"}  # anybody may import them; they import none of the levels but the model's description


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules():
    return sorted((ROOT / "dejavu").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT / "dejavu").parts[0]
    for name in imports_of(path):
        parts = name.split(".")
        assert parts[:2] not in (["dejavu", "cli"], ["dejavu", "benchmarks"]), f"{path} imports a leaf: {name}"
        if parts[0] == "dejavu" and len(parts) > 1 and parts[1] in LEVELS and package in BELOW:
            assert parts[1] == package or parts[1] in BELOW[package], f"{path} imports {name}"
        if parts[0] == "cuda":
            assert package == "device", f"{path} imports {name}"
        if parts[0] in ("mpi4py", "nccl"):
            assert package in ("transport", "cluster"), f"{path} imports {name}"


PURE_MODULES = ["dejavu.config", "dejavu.topology", "dejavu.request", "dejavu.model.spec", "dejavu.engine.scheduler"]
BENCHMARKS = ["generate", "microbench", "calibrate", "overhead", "disaggregation", "validate"]  # run outside mpirun too


COMMANDS = ", ".join(f"dejavu.cli.{path.stem}" for path in (ROOT / "cli").glob("[a-z]*.py"))


@pytest.mark.parametrize("module", [*PURE_MODULES, *(f"dejavu.benchmarks.{name}" for name in BENCHMARKS), COMMANDS])
def test_pure_modules_import_nothing_heavy(module):
    heavy = ("torch", "mpi4py", "transformers", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
