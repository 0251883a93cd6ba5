"""pyproject.toml, requirements.lock, environment.yml and the Makefile speak of the same environment."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
EXTRAS_LOCK = (ROOT / "requirements-extras.lock").read_text(encoding="utf-8")  # of all extras but `dev`, beside LOCK
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MINIMUM = "3.11"


def entries(lock: str) -> dict[str, tuple[Requirement, list[str]]]:
    """A lock's requirements by canonical name, each with its hashes."""
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for logical in lock.replace("\\\n", " ").splitlines():
        if not logical.strip() or logical.lstrip().startswith("#"):
            continue
        requirement = Requirement(logical.split("--hash")[0].strip())
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is locked twice; one version has to serve every platform and Python"
        found[name] = (requirement, re.findall(r"--hash=(\S+)", logical))
    return found


ENTRIES, EXTRA_ENTRIES = entries(LOCK), entries(EXTRAS_LOCK)
EXTRAS = PROJECT["project"]["optional-dependencies"]
DIRECT = [Requirement(text) for text in (*PROJECT["project"]["dependencies"], *EXTRAS["dev"])]
OPTIONAL = [Requirement(text) for extra in EXTRAS.keys() - {"dev"} for text in EXTRAS[extra]]


def locked_version(name: str) -> Version:
    (pin,) = ENTRIES[canonicalize_name(name)][0].specifier
    return Version(pin.version)


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_locked_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier, f"{requirement.name} has no lower bound in pyproject.toml"
    assert canonicalize_name(requirement.name) in ENTRIES
    assert requirement.specifier.contains(locked_version(requirement.name))


def test_the_extras_are_locked_with_the_versions_of_the_first_lock() -> None:
    for requirement in OPTIONAL:
        (pin,) = EXTRA_ENTRIES[canonicalize_name(requirement.name)][0].specifier
        assert requirement.specifier.contains(pin.version), requirement.name
    both = ENTRIES.keys() & EXTRA_ENTRIES.keys()
    assert len(both) > 10
    for name in both:
        assert ENTRIES[name][0].specifier == EXTRA_ENTRIES[name][0].specifier, name


def test_only_tests_and_those_who_ask_for_them_install_the_extras() -> None:
    assert {"ray", "faiss-cpu"} <= EXTRA_ENTRIES.keys() - ENTRIES.keys()
    needing = re.findall(r"^([\w-]+):.*\$\(EXTRAS\)", MAKEFILE, re.M)
    assert needing == ["extras", "test"]


@pytest.mark.parametrize("lock", [ENTRIES, EXTRA_ENTRIES], ids=["requirements.lock", "requirements-extras.lock"])
def test_every_lock_entry_is_one_exact_version_with_sha256_hashes(
    lock: dict[str, tuple[Requirement, list[str]]],
) -> None:
    assert len(lock) > (100 if lock is ENTRIES else 10)
    for name, (requirement, hashes) in lock.items():
        assert [pin.operator for pin in requirement.specifier] == ["=="], name
        assert hashes, f"{name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), name


@pytest.mark.parametrize("lock", [LOCK, EXTRAS_LOCK], ids=["requirements.lock", "requirements-extras.lock"])
def test_a_lock_names_no_address_and_no_file_of_a_machine(lock: str) -> None:
    assert "://" not in lock
    assert not re.search(r"^\s*(-i|-f|-e|--index-url|--extra-index-url|--find-links|--trusted-host)\b", lock, re.M)
    assert not re.search(r" @ |/(home|root|tmp|Users|work)/", lock)


def test_the_lock_serves_linux_macos_and_windows() -> None:
    platforms = {
        "linux": {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"},
        "macos": {"sys_platform": "darwin", "platform_machine": "arm64", "os_name": "posix"},
        "windows": {"sys_platform": "win32", "platform_machine": "AMD64", "os_name": "nt"},
    }
    common = {"python_full_version": "3.11.9", "python_version": "3.11", "implementation_name": "cpython"}

    def applies(name: str, platform: str) -> bool:
        marker: Marker | None = ENTRIES[name][0].marker
        return name in ENTRIES and (marker is None or marker.evaluate({**common, **platforms[platform]}))

    for platform in platforms:
        for requirement in DIRECT:
            assert applies(canonicalize_name(requirement.name), platform), (requirement.name, platform)
    assert applies("triton", "linux") and not applies("triton", "macos") and not applies("triton", "windows")
    assert applies("pywinpty", "windows") and not applies("pywinpty", "linux")
    assert applies("appnope", "macos") and not applies("appnope", "linux")


def test_pins_that_are_known_to_import_together() -> None:
    assert locked_version("torch") == Version("2.14.1")
    assert locked_version("torchvision") == Version("0.29.1")
    assert locked_version("dvc") in SpecifierSet("==3.67.*")


def test_the_bounds_admit_the_older_torch_that_the_code_supports() -> None:
    bounds = {requirement.name: requirement.specifier for requirement in DIRECT}
    assert bounds["torch"].contains("2.11.0")
    assert bounds["torchvision"].contains("0.26.0")


def test_python_versions_agree() -> None:
    assert PROJECT["project"]["requires-python"] == f">={MINIMUM}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + MINIMUM.replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == MINIMUM
    assert f"python={MINIMUM}" in ENVIRONMENT["dependencies"]
    assert "sys.version_info < (3, 11)" in MAKEFILE
    assert f"--python-version {MINIMUM}" in MAKEFILE
    assert sys.version_info >= (3, 11)


def test_conda_users_get_the_lock_and_nothing_else() -> None:
    python, pip, section = ENVIRONMENT["dependencies"]
    assert (python, pip) == (f"python={MINIMUM}", "pip")
    assert section == {"pip": ["-r requirements.lock"]}
    assert ENVIRONMENT["name"] == PROJECT["project"]["name"]


def test_readme_and_environment_install_the_project_with_the_locked_setuptools_as_make_does() -> None:
    """Without --no-build-isolation pip fetches whatever setuptools is the newest."""
    command = "pip install --no-deps --no-build-isolation -e ."
    for name in ("README.md", "environment.yml"):
        assert f"python -m {command}" in (ROOT / name).read_text(encoding="utf-8")
    assert command.replace("pip install ", "") in MAKEFILE and "setuptools" in ENTRIES


def test_every_import_of_the_project_is_a_direct_dependency() -> None:
    distributions = {"PIL": "pillow", "faiss": "faiss-cpu", "yaml": "pyyaml"}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    optional = {"batch.py": {"ray", "rich"}, "nearest.py": {"faiss-cpu"}}  # what says how to install what it lacks
    own = set(PROJECT["tool"]["setuptools"]["packages"])
    pattern = re.compile(r"^\s*(?:import|from)\s+([A-Za-z_]\w*)", re.M)
    for package in own:
        for path in (ROOT / package).glob("*.py"):
            allowed = declared | optional.get(path.name, set())
            # Sentences of docstrings may begin with "from"; only lines that are code count.
            code = re.sub(r'"""[\s\S]*?"""', "", path.read_text(encoding="utf-8"))
            for name in pattern.findall(code):
                if name not in own and name not in sys.stdlib_module_names:
                    assert canonicalize_name(distributions.get(name, name)) in allowed, (path.name, name)


def test_every_package_folder_is_installed() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_alone_prints_its_commands_and_none_of_the_comments_on_how_they_work(tmp_path: Path):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    done = subprocess.run(["make", "--silent"], cwd=tmp_path, capture_output=True, text=True, check=True)
    head = [line.removeprefix("# ") for line in MAKEFILE.partition("\n\n")[0].splitlines()]
    assert [line for line in done.stdout.splitlines() if not line.startswith("make[")] == head
