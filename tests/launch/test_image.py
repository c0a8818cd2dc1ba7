"""docker/: what its Dockerfile names is there, the smoke test passes here, and so it does in the image."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commands import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
SMOKE = ROOT / "docker" / "smoke"
LOCK = ROOT / "launch" / "requirements.lock"
UNKNOWN_USER = "12345:12345"  # has no line in the image's /etc/passwd


# ---- Without an image ------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest of its line) of the Dockerfile, continuation lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def sources() -> set[str]:
    """The files and folders of the repository that the Dockerfile takes; "" is all that is not ignored."""
    found = set()
    for instruction, rest in instructions():
        if instruction == "COPY":
            found |= set(rest.split()[:-1])
        for mount in re.findall(r"--mount=(\S+)", rest):
            options = dict(option.split("=") for option in mount.split(","))
            found.add(options.get("source", ""))
    return found


def is_in_context(path: str) -> bool:
    """Whether .dockerignore lets a path through: its last matching line decides."""
    inside = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            name = pattern.removeprefix("!").removeprefix("**/")
            if any(fnmatch.fnmatch(start, name) for start in starts(path)) or (
                "**/" in pattern and Path(path).match(name)
            ):
                inside = pattern.startswith("!")
    return inside


def starts(path: str) -> list[str]:
    """a/b/c: a, a/b, a/b/c; what is said of a folder is said of all that it holds."""
    parts = path.split("/")
    return ["/".join(parts[:number]) for number in range(1, len(parts) + 1)]


def test_the_dockerfile_takes_what_is_there_and_pinned_versions_only() -> None:
    assert sources() == {
        "",
        "launch/requirements.lock",
        "launch/torchrun.sh",
        "launch/deepspeed.sh",
        "docker/smoke",
    }
    packaged = {"pyproject.toml", "README.md", "LICENSE", "distllm/__main__.py", "conf/config.yaml"}
    for path in (sources() - {""}) | packaged:
        assert (ROOT / path).is_file(), path
        assert is_in_context(path), path
    for path in (
        ".git/HEAD",
        ".venv/bin/python",
        "runs/mine/status.json",
        "distllm/__pycache__",
        "tests/runs.py",
    ):
        assert not is_in_context(path), path

    installs = [line for word, rest in instructions() if word == "RUN" for line in rest.split("&&")]
    installs = [line for line in installs if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert ("-r /tmp/requirements.lock" in line) != ("--no-deps" in line), line
        assert "--no-cache-dir" in line
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users == ["distllm"]
    assert os.access(SMOKE, os.X_OK)


def test_the_dockerfile_installs_what_nccl_and_triton_look_for() -> None:
    """Without the verbs' libraries NCCL falls back to TCP, without a compiler kernels run uncompiled."""
    (line,) = [rest for word, rest in instructions() if word == "RUN" and "apt-get install" in rest]
    installed = set(line.split("apt-get install")[1].split("&&")[0].split())
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= installed
    assert {"gcc", "libc6-dev", "python3-dev"} <= installed


def smoke_here(folder: Path, distllm: str) -> subprocess.CompletedProcess[str]:
    """The smoke test with this interpreter as `python3` and the shell script `distllm` as that command."""
    for name, text in {"python3": f'exec {sys.executable} "$@"', "distllm": distllm}.items():
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    (folder / "temporary").mkdir()
    environment = os.environ | {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "temporary"),
    }
    return subprocess.run([SMOKE], cwd="/", env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.long
def test_the_smoke_test_passes_here(tmp_path: Path) -> None:
    result = smoke_here(tmp_path, 'exec python3 -m distllm "$@"')
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("smoke: OK\n"), result.stdout
    assert result.stderr == ""
    assert os.listdir(tmp_path / "temporary") == []


def test_the_smoke_test_tells_what_failed(tmp_path: Path) -> None:
    # Trains, and never saves.
    result = smoke_here(tmp_path, 'case $1 in train) exit 0;; esac; echo "no disk" >&2; exit 3')
    assert result.returncode == 1
    assert "smoke: OK" not in result.stdout
    assert result.stderr == "no disk\nsmoke: FAILED: distllm is there\n"


# ---- The image -------------------------------------------------------------------------------------------


class Buildah:
    """buildah without a daemon, its images and containers in a folder that goes at the end of the `with`."""

    def __init__(self) -> None:
        # Not below tmp_path, which pytest keeps: these are gigabytes.
        self.folder = Path(tempfile.mkdtemp(prefix="image-"))

    def __enter__(self) -> Buildah:
        return self

    def __exit__(self, *_: object) -> None:
        # Never remove what is mounted from elsewhere; debootstrap leaves its /proc where it fails.
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed([mount for mount in mounts if mount.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", mount], check=True)
        shutil.rmtree(self.folder)

    def __call__(self, *arguments: str | Path, seconds: float = 60) -> str:
        """The command's standard output."""
        store = [f"--root={self.folder}/root", f"--runroot={self.folder}/run", "--storage-driver=vfs"]
        return execute(["buildah", *store, *arguments], seconds)

    def run(self, container: str, *command: str, options: tuple[str, ...] = (), seconds: float = 60) -> str:
        return self("run", "--isolation=chroot", *options, container, "--", *command, seconds=seconds)


def execute(command: list[str | Path], seconds: float) -> str:
    """Standard output; an assertion with all output if it fails. No process of it is left, even of a hang."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (output, errors):
            stream.seek(0)
        texts = output.read(), errors.read()
    shown = " ".join(map(str, command))
    print(f"{time.monotonic() - begin:6.1f} s  {shown}\n{texts[0][-3000:]}", flush=True)
    assert process.returncode == 0, f"{shown}: {process.returncode}\n{texts[0][-8000:]}{texts[1][-8000:]}"
    return texts[0]


def pip_of_this_machine(folder: Path) -> list[str]:
    """Options of `buildah bud` with which pip inside is configured as pip is here: mounts, of which the image
    keeps nothing. Files that the configuration names are mounted, too, two folders deep, below /run/host."""
    listed = execute([sys.executable, "-m", "pip", "config", "list"], 60).splitlines()
    settings, mounted = {}, set()
    # The environment's come last and win, as they do in pip.
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            settings[option] = str(ast.literal_eval(value))
    for option, value in settings.items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                top = Path(*path.parts[:3])
                mounted.add(f"--volume={top}:/run/host{top}:ro")
                word = word.replace(str(path), f"/run/host{path}")
            words.append(word)
        settings[option] = " ".join(words)
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{option} = {value}\n" for option, value in settings.items()))
    return [*sorted(mounted), f"--volume={file}:/etc/pip.conf:ro"]


@pytest.fixture
def buildah() -> Iterator[Buildah]:
    assert os.geteuid() == 0, "building an image on an empty Debian needs root"
    missing = [program for program in ("buildah", "debootstrap") if not shutil.which(program)]
    if missing:
        execute(["apt-get", "update", "--quiet"], 120)
        execute(["apt-get", "install", "--yes", "--no-install-recommends", *missing], 300)
    with Buildah() as buildah:
        yield buildah


def locked() -> set[str]:
    return {line for line in LOCK.read_text().splitlines() if not line.startswith("#")}


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_the_image_works_on_an_empty_debian(buildah: Buildah) -> None:
    empty = buildah("from", "scratch").strip()
    execute(["debootstrap", "--variant=minbase", "bookworm", buildah("mount", empty).strip()], 300)
    buildah("commit", "--rm", "--quiet", empty, "base", seconds=120)
    options = ["--isolation=chroot", "--build-arg=BASE=base", f"--file={DOCKERFILE}", "--tag=distllm"]
    pip = pip_of_this_machine(buildah.folder)
    buildah("bud", "--pull-never", "--no-cache", *options, *pip, ROOT, seconds=900)
    buildah("images")

    # The image's own user.
    container = buildah("from", "--pull-never", "distllm", seconds=120).strip()
    output = buildah.run(container, "docker/smoke", seconds=400)
    assert output.endswith("smoke: OK\n")
    assert ", user 10000\n" in output
    buildah("rm", container)
    # Any other user, in the folder that the image starts in.
    container = buildah("from", "--pull-never", "distllm", seconds=120).strip()
    train = [
        "model=tiny",
        "tokenizer=bytes",
        "data=text",
        "data.path=corpus/*.txt",
        "data.validation_fraction=0",
    ]
    train += ["train.validation_interval=0", "train.steps=2", "logging.sample_tokens=0", "run.dir=runs/mine"]
    script = 'mkdir corpus && seq 9999 > corpus/1.txt && "$@" && cat runs/mine/status.json && id -u'
    launcher = ["launch/torchrun.sh", "--nproc-per-node=1", "-m", "distllm", "train"]
    user = (f"--user={UNKNOWN_USER}",)
    output = buildah.run(container, "sh", "-c", script, "-", *launcher, *train, options=user, seconds=120)
    assert '"state": "completed"' in output
    assert output.endswith(f"\n{UNKNOWN_USER.split(':')[0]}\n")

    frozen = buildah.run(container, "pip", "freeze").splitlines()
    assert locked() <= {re.sub(r"\+[\w.]+$", "", line) for line in frozen}
    # What Triton compiles with, and what NCCL loads.
    compile = "echo '#include <Python.h>' | cc -fsyntax-only $(python3-config --includes) -x c -"
    buildah.run(container, "sh", "-c", f"{compile} && ldconfig -p | grep -q libibverbs.so.1")
    # No compiler but that of C, no caches, and nothing of how this machine reaches its registries.
    places = "/etc/pip.conf /run/host /root/.cache /var/lib/apt/lists /var/cache/apt/archives"
    look = f"for name in nvcc git; do command -v $name; done; find {places} -type f -size +0; true"
    assert buildah.run(container, "sh", "-c", look, options=("--user=0",)) == ""
