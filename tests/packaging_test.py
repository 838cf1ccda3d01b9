"""What is installed is complete, and what is pinned is what the project says it needs."""

import configparser
import importlib.metadata
import pathlib
import re


def requirements(repository: pathlib.Path) -> list[str]:
    config = configparser.ConfigParser()
    config.read(repository / "setup.cfg")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["dev"]
    return [re.split(r"[\[<>=! ]", line)[0] for line in lines.split("\n") if line.strip()]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned_and_installed_as_pinned(repository):
    pinned = {}
    for line in (repository / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[normal(name)] = version
    for name in requirements(repository):
        assert normal(name) in pinned, f"constraints.txt lacks {name}"
        assert importlib.metadata.version(name) == pinned[normal(name)]


def test_every_folder_with_code_is_a_package(repository):
    for root in ("src/olmax", "kernels_pallas", "experiments"):
        # `find_packages` in setup.py takes folders with an __init__.py; the others stay behind.
        folders = {path.parent for path in (repository / root).rglob("*.py")}
        scripts = set((repository / "experiments").glob("*/peers"))  # run by another Python
        assert [f for f in folders - scripts if not (f / "__init__.py").exists()] == []


def test_nothing_imports_upwards(repository):
    """The order of docs/architecture.md."""
    order = [
        "errors", "models", "sharding", "distributed", "interop", "data", "training",
        "generation", "reporting", "evaluation", "pretrained", "merging", "scaling", "planning",
        "launching", "cli",
    ]  # fmt: skip
    rank = {name: i for i, name in enumerate(order)}
    for path in (repository / "src/olmax").rglob("*.py"):
        parts = path.relative_to(repository / "src/olmax").with_suffix("").parts
        for target in re.findall(r"^(?:from|import) olmax\.(\w+)", path.read_text(), re.M):
            if parts[0] in rank and target in rank:
                assert rank[target] <= rank[parts[0]], f"{path} imports olmax.{target}"
    for path in (repository / "src").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) experiments\b", path.read_text(), re.M), path
    for path in (repository / "kernels_pallas").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (olmax|experiments)\b", path.read_text(), re.M), (
            path
        )
