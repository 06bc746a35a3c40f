"""What is installed: the wheel's contents, and what scripts/setup does in which case."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.message import Message
from pathlib import Path

import pytest

from sgl_lmcache import SGLANG_VERSION

ROOT = Path(__file__).parent.parent
ROOMS = ("radix", "transfer", "hicache", "sgl_lmcache")
EXTRAS = {
    "valkey": "valkey[libvalkey]",
    "mooncake": "mooncake-transfer-engine",
    "mooncake-cpu": "mooncake-transfer-engine-non-cuda",
    "simulate": "matplotlib",
    "trace": "opentelemetry-sdk",
    "test": "pytest",
}


def copy_checkout(target: Path) -> Path:
    """What a wheel is built from. A copy, because setuptools leaves folders behind and packs what it finds in them."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, target)
    (target / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", target / "scripts")
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, target = copy_checkout(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def info_file(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_string(info_file(wheel, "METADATA"))


def test_the_wheel_holds_every_module_of_the_rooms_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    expected.add("sgl_lmcache/py.typed")
    packed = {path for path in wheel.namelist() if ".dist-info/" not in path}
    assert packed == expected


def test_the_stand_in_is_packed_and_is_no_top_level_package(wheel: zipfile.ZipFile) -> None:
    assert "sgl_lmcache/cpu/stand_in/sgl_kernel/__init__.py" in wheel.namelist()
    assert {path.partition("/")[0] for path in wheel.namelist() if ".dist-info/" not in path} == set(ROOMS)


def test_the_wheel_holds_the_licence_and_the_notice(wheel: zipfile.ZipFile) -> None:
    for name in ("LICENSE", "NOTICE"):
        assert info_file(wheel, f"licenses/{name}") == (ROOT / name).read_text(encoding="utf-8")


def test_the_entry_points_lead_to_what_is_there(wheel: zipfile.ZipFile) -> None:
    parser = ConfigParser()
    parser.read_string(info_file(wheel, "entry_points.txt"))
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"sgl-lmcache": "sgl_lmcache.cli:main"},
        "sglang.srt.plugins": {"sgl_lmcache": "sgl_lmcache.plugin:register"},
    }
    for module, function in (("cli", "main"), ("plugin", "register")):
        assert f"def {function}(" in wheel.read(f"sgl_lmcache/{module}.py").decode()


def test_the_metadata_pins_sglang_and_offers_the_extras(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist", [])
    assert f"sglang=={SGLANG_VERSION}" in requirements
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)
    for extra, package in EXTRAS.items():
        assert any(line.startswith(package) and line.endswith(f'extra == "{extra}"') for line in requirements)


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/test", "scripts/check", "scripts/demo", ".ci/run"])
def test_scripts_can_be_run_and_parsed(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


FAKE_PYTHON = """#!/bin/sh
# Stands for Python: answers what setup asks it, and writes down what setup has it do.
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *get_path*) dirname "$0"; exit ;;
    "-m pip install "*) if [ -e "$FAKE_HOME/interrupt" ]; then exit 1; fi ;;
    *) exit 0 ;;
esac
echo "$*" >>"$FAKE_HOME/log"
"""


class Setup:
    """scripts/setup of a copied checkout, on a machine whose Python is a stand-in that installs nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / "shared" / "venv"
        self.checkout = self.new_checkout("first")
        programs = folder / "bin"
        programs.mkdir()
        for name in ("python3.11", "c++"):
            (programs / name).write_text(FAKE_PYTHON)
            (programs / name).chmod(0o755)
        (programs / "Python.h").touch()

    def new_checkout(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return copy_checkout(self.folder / name)

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "FAKE_HOME": str(self.folder), "SGL_LMCACHE_VENV": str(self.venv)}

    def run(self, *arguments: str, checkout: Path | None = None) -> tuple[int, list[str], str]:
        """The exit code, what Python was told to do, and what setup printed."""
        log = self.folder / "log"
        log.write_text("")
        command = [str((checkout or self.checkout) / "scripts" / "setup"), *arguments]
        process = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        return process.returncode, log.read_text().splitlines(), process.stdout + process.stderr


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_setup_says_what_it_costs_and_installs_once(setup: Setup) -> None:
    code, done, printed = setup.run()
    assert code == 0
    assert done == [f"-m venv {setup.venv}", f"-m pip install --editable {setup.checkout}[test]"]
    assert "3 to 6 minutes" in printed
    assert setup.run() == (0, [], "")


def test_setup_for_another_checkout_only_points_the_environment_to_it(setup: Setup) -> None:
    setup.run()
    second = setup.new_checkout("second checkout")
    quick = "-m pip install --quiet --no-deps --no-build-isolation --editable"
    assert setup.run(checkout=second)[:2] == (0, [f"{quick} {second}"])
    assert setup.run(checkout=second) == (0, [], "")
    assert setup.run()[:2] == (0, [f"{quick} {setup.checkout}"])


def test_setup_that_was_interrupted_goes_on(setup: Setup) -> None:
    (setup.folder / "interrupt").touch()
    code, done, _ = setup.run()
    assert code == 1
    assert done == [f"-m venv {setup.venv}"]
    (setup.folder / "interrupt").unlink()
    assert setup.run()[:2] == (0, [f"-m pip install --editable {setup.checkout}[test]"])


@pytest.mark.parametrize("file", ["pyproject.toml", "scripts/setup"])
def test_setup_installs_again_when_what_is_installed_may_have_changed(setup: Setup, file: str) -> None:
    setup.run()
    with (setup.checkout / file).open("a") as stream:
        stream.write("# changed\n")
    assert setup.run()[:2] == (0, [f"-m pip install --editable {setup.checkout}[test]"])


def test_setup_waits_for_another_on_the_same_environment(setup: Setup) -> None:
    setup.run()
    lock = setup.venv / "sgl-lmcache-setup.lock"
    holder = subprocess.Popen(
        ["flock", str(lock), "sh", "-c", "echo held; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        command = [str(setup.checkout / "scripts" / "setup")]
        with subprocess.Popen(command, env=setup.environment(), stdout=subprocess.PIPE) as waiting:
            assert waiting.stdout is not None
            assert b"waiting for another setup" in waiting.stdout.readline()
            assert waiting.poll() is None
            holder.stdin.close()
        assert waiting.returncode == 0


def test_setup_names_the_missing_packages_where_it_cannot_install_them(setup: Setup) -> None:
    (setup.folder / "bin" / "Python.h").unlink()
    (setup.folder / "bin" / "id").write_text("#!/bin/sh\necho 1000\n")
    (setup.folder / "bin" / "id").chmod(0o755)
    code, done, printed = setup.run()
    assert (code, done) == (1, [])
    assert "apt-get install bin-dev" in printed


def test_setup_goes_on_without_what_only_some_tests_need(setup: Setup) -> None:
    for name, says in (("id", "1000"), ("ldconfig", "libnuma.so.1 (libc6,x86-64) => /lib/libnuma.so.1")):
        (setup.folder / "bin" / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (setup.folder / "bin" / name).chmod(0o755)
    code, done, printed = setup.run()
    assert code == 0
    assert done[-1] == f"-m pip install --editable {setup.checkout}[test]"
    (told,) = (line for line in printed.splitlines() if "libibverbs1" in line)
    assert "apt-get install libibverbs1 librdmacm1" in told
    assert told.endswith("the tests that need them are left out")
    assert "libnuma1" not in told


def test_setup_explains_itself_and_refuses_what_it_does_not_know(setup: Setup) -> None:
    code, done, printed = setup.run("--help")
    assert (code, done) == (0, [])
    assert "SGL_LMCACHE_VENV" in printed
    assert setup.run("--fast")[:2] == (2, [])
