"""The demo of docker/compose.yaml for real, from a base image of Debian's packages on; gigabytes, and many minutes.

``pytest -m nightly -rP`` shows how long it took from the base image to the results of the first run; what Docker has
in its cache costs no time.
"""

import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import results

from fgl_app import tiny
from fgl_app.config import APP_FOLDER

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

BASE_IMAGE = "fgl-test-base"
PROJECT = "fgltest"


def compose() -> list[str]:
    """Return Docker's Compose, as a plugin or as the program of its own that Debian has."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def documented(file: Path, word: str) -> list[str]:
    """Return the one command in a file's head that ends with ``word``."""
    lines = [line.removeprefix("#").strip() for line in file.read_text().splitlines()]
    (line,) = [line for line in lines if line.startswith(("docker", "sudo docker")) and line.endswith(word)]
    return shlex.split(line.removeprefix("sudo "))


def do(command: list[str], timeout: float = 2400, expect: int | None = 0, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=APP_FOLDER, env=os.environ | environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False,
    )  # fmt: skip
    assert expect is None or done.returncode == expect, f"{command}\n{done.stdout[-8000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def base_image() -> str:
    """Build the base image by its script, unless BASE_IMAGE names one."""
    for tool in ("docker", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if os.geteuid() != 0 or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root and a running Docker Engine")
    if given := os.environ.get("BASE_IMAGE"):
        return given
    script, _ = documented(APP_FOLDER / "docker" / "debian_base.sh", "fgl-base")
    do([str(APP_FOLDER / script), BASE_IMAGE])
    return BASE_IMAGE


@pytest.fixture(scope="module")
def began(base_image) -> float:
    """Return the monotonic time in seconds at which there is a base image, and nothing is built on it yet."""
    return time.monotonic()


@pytest.fixture(scope="module")
def demo(began, base_image, tmp_path_factory) -> Iterator[Path]:
    """Start the demo by its documented command and take it down at the end."""
    folder = tmp_path_factory.mktemp("demo")
    file = APP_FOLDER / "docker" / "compose.yaml"
    environment = {"BASE_IMAGE": base_image, "FGL_DEMO": str(folder), "COMPOSE_PROJECT_NAME": PROJECT}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        try:
            do(compose() + documented(file, "--detach")[2:])
            yield folder
        finally:
            do([*compose(), "--file", str(file), "down", "--volumes"], expect=None)


def job(expect: int = 0, **environment: str) -> str:
    words = documented(APP_FOLDER / "docker" / "compose.yaml", "job")[2:]
    return do(compose() + words, expect=expect, **environment)


def units(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "synthetic").rglob("*.safetensors")}


def visitor(demo: Path, script: str) -> str:
    """Run a script in a client's container on the sites' network, with site0's copy of the CA's certificate."""
    return do(
        ["docker", "run", "--rm", "--network", f"{PROJECT}_sites", "--entrypoint", "bash", "--volume",
         f"{demo}/certificates/site0/ca.crt:/ca.crt:ro", "fgl-client", "-c", script],
        expect=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def first_run(began, demo) -> str:
    """Do the documented run, and return what it said."""
    said = job()
    minutes = (time.monotonic() - began) / 60
    # A warning, because pytest keeps nothing lesser by default.
    logging.getLogger(__name__).warning("from the base image to results in %.1f minutes", minutes)
    return said


def test_the_demo_ends_with_results_in_the_mounted_folder(demo, first_run):
    assert "finished:completed" in first_run
    found = results(demo / "runs" / "demo")
    assert [(row["round"], row["phase"], row["clients"]) for row in found["rounds"]] == [
        (1, "one-shot", 0),
        (2, "federated", 3),
    ]
    assert (demo / "runs" / "demo" / "prompts.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_cluster_of_ray_draws_the_same_images(demo, first_run, tmp_path):
    drawn = units(demo / "runs" / "demo")
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    shutil.copy(demo / "runs" / "demo" / "plan.json", run)
    for path in (tmp_path / "runs", run, run / "plan.json"):
        os.chown(path, 1000, 1000)
    own = {"COMPOSE_PROJECT_NAME": f"{PROJECT}ray", "FGL_DEMO": str(tmp_path)}
    up = documented(APP_FOLDER / "docker" / "compose.ray.yaml", "--scale ray-worker=2")[2:]
    files = up[: up.index("up")]
    try:
        do([*compose(), *up, "superlink", "ray-worker"], **own)
        words = ["exec", "-T", "superlink", "fgl", "synthesize", "/runs/demo/plan.json", "--workers", "2"]
        output = do([*compose(), *files, *words, "--ray-address", "ray-head:6379"], **own)
    finally:
        do([*compose(), *files, "down", "--volumes"], expect=None, **own)

    assert f"{10 * 64} images drawn" in output
    assert units(run) == drawn


def test_models_that_are_mounted_are_used_and_nothing_is_downloaded(demo):
    for name in (tiny.DIFFUSION, tiny.CAPTIONER):
        shutil.copytree(tiny.folder_of(name), demo / "models" / name)
        (demo / "models" / name).chmod(0o755)  # the containers' user has another number
    config = 'run-name="mounted" dataset="folder" num-clients=3 num-server-rounds=1 image-size=8 model="cnn" '
    config += "images-per-class=16 num-inference-steps=4 server-epochs=2 server-finetune-epochs=0 "
    config += f'generator="/models/{tiny.DIFFUSION}" prompt-level="instance" captioner="/models/{tiny.CAPTIONER}"'

    output = job(FGL_RUN_CONFIG=config)  # no container reaches anything outside

    assert "finished:completed" in output
    prompts = (demo / "runs" / "mounted" / "prompts.jsonl").read_text()
    assert "handwritten" in prompts
    assert results(demo / "runs" / "mounted")["prompt_round"]["clients_used"] == 3


def test_a_run_that_failed_makes_the_job_fail(demo):
    config = 'run-name="none" dataset="folder" class-names="cat,dog" num-clients=3 image-size=8'

    output = job(expect=1, FGL_RUN_CONFIG=config)

    assert "finished:failed" in output
    assert not (demo / "runs" / "none" / "results.json").exists()


def test_strangers_are_refused(demo):
    python = "from cryptography.hazmat.primitives.asymmetric import ec; from cryptography.hazmat.primitives import "
    python += "serialization as s; open('/tmp/stranger', 'wb').write(ec.generate_private_key(ec.SECP384R1())."
    python += "private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))"
    node = "flower-supernode --superlink superlink:8443"

    unregistered = visitor(
        demo,
        f'python3 -c "{python}"; timeout 60 {node} --root-certificates /ca.crt '
        "--auth-supernode-private-key /tmp/stranger",
    )
    plaintext = visitor(demo, f"timeout 60 {node} --insecure")

    for said in (unregistered, plaintext):
        assert "Exit Code: 305" in said
        assert "SuperNode ID" not in said


def test_the_sites_reach_the_fleet_api_of_the_server_and_nothing_else(demo):
    ask = (
        "import socket, ssl, urllib.request as r, urllib.error\n"
        "context = ssl.create_default_context(cafile='/ca.crt')\n"
        "for path in ('v1/control/list-runs', 'v1/runtime/pull-pending-tasks', 'health'):\n"
        "    try: r.urlopen('https://superlink:8443/' + path, data=b'', context=context)\n"
        "    except urllib.error.HTTPError as error: print(path, error.code)\n"
        "for address in (('superlink', 8000), ('192.0.2.1', 80)):\n"
        "    try: socket.create_connection(address, 5); print(address[0], 'reached')\n"
        "    except OSError: print(address[0], 'not reached')\n"
    )

    said = visitor(demo, f"python3 - <<'PYTHON'\n{ask}PYTHON")

    assert said.split("\n")[:5] == [
        "v1/control/list-runs 403",
        "v1/runtime/pull-pending-tasks 403",
        "health 403",
        "superlink not reached",
        "192.0.2.1 not reached",
    ]


def test_nothing_runs_as_root_and_everything_is_healthy(demo):
    for service in ("superlink", "gate", "site0", "site1", "site2"):
        container = do(["docker", "ps", "--quiet", "--filter", f"name={PROJECT}.{service}"]).strip()
        assert do(["docker", "exec", container, "id", "--user"]).strip() == "1000"
        assert do(["docker", "inspect", "--format", "{{.State.Health.Status}}", container]).strip() == "healthy"


def test_who_operates_sees_no_private_key(demo):
    held = {path.name for path in (demo / "certificates" / "operator").iterdir()}

    assert held == {"ca.crt", "site0.pub", "site1.pub", "site2.pub"}


def test_the_gpu_is_the_servers(demo):
    words = documented(APP_FOLDER / "docker" / "compose.gpu.yaml", "--detach")[2:]

    merged = yaml.safe_load(do([*compose(), *words[: words.index("up")], "config"]))

    owners = [name for name, service in merged["services"].items() if "reservations" in str(service.get("deploy"))]
    assert owners == ["superlink"]
    (device,) = merged["services"]["superlink"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_server_can_compile_kernels_for_a_gpu(demo):
    python = "from fgl_app.compilation import lacking_for_compilation; print(lacking_for_compilation('cuda'))"

    said = do(["docker", "run", "--rm", "--network", "none", "--entrypoint", "python3", "fgl-server", "-c", python])

    assert said.strip().endswith("None")


def test_the_image_without_a_target_is_the_command_fgl(base_image, tmp_path):
    tmp_path.chmod(0o777)
    build = documented(APP_FOLDER / "docker" / "Dockerfile", "--tag fgl --file docker/Dockerfile .")
    do([*build, "--build-arg", f"BASE_IMAGE={base_image}"])

    do(
        ["docker", "run", "--rm", "--network", "none", "--volume", f"{tmp_path}:/runs", "fgl", "run",
         "num-server-rounds=1", "model=cnn", "images-per-class=16", "num-inference-steps=4", "server-epochs=2",
         "image-size=8", "--clients", "2"],
    )  # fmt: skip

    assert len(results(tmp_path / "digits")["rounds"]) == 1
