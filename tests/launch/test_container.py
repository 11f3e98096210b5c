"""The image can't be built in the tests. What can be checked of its recipe without an engine is checked here."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_config
from tests.weights import folder_of


@pytest.fixture
def dockerfile(repository: Path) -> str:
    """The Dockerfile with continued lines joined."""
    return re.sub(r"\\\n\s*", "", (repository / "Dockerfile").read_text())


def instructions(dockerfile: str, name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", dockerfile, re.MULTILINE)


def test_the_linter_finds_nothing(scripts: Path, repository: Path) -> None:
    hadolint = scripts / "hadolint"
    if not hadolint.exists():
        pytest.fail("hadolint is missing: pip install -c constraints.txt -e .[dev]")
    run = subprocess.run([hadolint, repository / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "")


def test_all_that_is_copied_exists_and_is_not_ignored(dockerfile: str, repository: Path) -> None:
    kept = [line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in instructions(dockerfile, "COPY"):
        for source in (word.rstrip("/") for word in line.split()[:-1]):
            assert (repository / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), f"{source} is in .dockerignore"


def test_dependencies_are_installed_before_the_code_is_copied(dockerfile: str) -> None:
    install = dockerfile.index("pip install -c constraints.txt")
    assert dockerfile.index("COPY constraints.txt pyproject.toml") < install < dockerfile.index("COPY dctc/")


def test_it_runs_dctc_itself_and_not_as_root(dockerfile: str) -> None:
    assert instructions(dockerfile, "ENTRYPOINT") == ['["tini", "--", "dctc"]']
    (user,) = instructions(dockerfile, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_the_base_image_is_a_pinned_cuda_runtime(dockerfile: str) -> None:
    (base,) = instructions(dockerfile, "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d+\.\d+", base)


class Image:
    """The folders of an image below one of this machine, made by the Dockerfile's own instructions."""

    def __init__(self, root: Path, repository: Path) -> None:
        self.root, self.repository = root, repository
        self.place = Path("/")
        self.variables: dict[str, str] = {}
        self.entry: list[str] = []

    def inside(self, text: str) -> str:
        """A text with the image's folders replaced by those that stand for them."""
        return re.sub(r"(?<![\w./])/(opt|tmp|work)(?=[/:\s]|$)", rf"{self.root}/\1", text)

    def run(self, command: str | list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        for name, value in self.variables.items():
            environment[name] = self.inside(value).replace("$PATH", os.environ["PATH"])
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return subprocess.run(
            command, shell=isinstance(command, str), cwd=self.inside(str(self.place)),
            env=pip | environment | variables, capture_output=True, text=True, timeout=540, check=False,
        )  # fmt: skip

    def follow(self, dockerfile: str) -> None:
        """Do what the Dockerfile says, but for the distribution's packages and users."""
        for line in dockerfile.splitlines():
            name, _, rest = line.partition(" ")
            if name == "WORKDIR":
                self.place = Path(rest)
                Path(self.inside(rest)).mkdir(parents=True, exist_ok=True)
            elif name == "ENV":
                self.variables |= dict(word.split("=", 1) for word in shlex.split(rest))
            elif name == "COPY":
                *sources, target = rest.split()
                for source in (self.repository / word for word in sources):
                    if source.is_dir():
                        ignored = shutil.ignore_patterns("__pycache__")
                        shutil.copytree(source, Path(self.inside(str(self.place)), target), ignore=ignored)
                    else:
                        shutil.copy(source, Path(self.inside(str(self.place)), target))
            elif name == "RUN" and "pip" in rest:
                done = self.run(self.inside(rest).replace("python3 -m venv", f"{sys.executable} -m venv"))
                assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
            elif name == "ENTRYPOINT":
                self.entry = [word for word in re.findall(r'"([^"]+)"', rest) if word not in ("tini", "--")]


@pytest.mark.slow
@pytest.mark.replay
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    os.environ.get("DCTC_REPLAY_IMAGE") != "1",
    reason="installs 1.9 GB anew, 2 to 3 minutes: set DCTC_REPLAY_IMAGE=1, as .ci/run does",
)
def test_the_steps_of_the_recipe_make_an_image_that_trains(
    dockerfile: str, repository: Path, tmp_path: Path, tiny_dataset: Path
) -> None:
    root = tmp_path / "image"
    (root / "tmp").mkdir(parents=True)
    image = Image(root, repository)
    image.follow(dockerfile)
    python = root / "opt" / "venv" / "bin" / "python"
    assert image.run([str(python), "-m", "pip", "check"]).returncode == 0
    assert image.run([*image.entry, "--help"]).returncode == 0
    where = image.run([str(python), "-c", "import dctc, torch; print(dctc.__file__, torch.__file__, sep='\\n')"])
    assert all(line.startswith(f"{root}/opt/") for line in where.stdout.splitlines()), where
    config = write_config(tmp_path / "image.yaml", tiny_dataset, schedule={"rounds": 2})
    trained = image.run(
        [f"{root}/opt/dctc/launch/torchrun.sh", str(config)], ACCELERATE_USE_CPU="true", NPROC_PER_NODE="2"
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (folder_of(config) / "model.safetensors").exists()
