"""The image and the compose file: there is no Docker in the tests, but all that it would read and run is checked."""

from __future__ import annotations

import fnmatch
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import chart, redis_servers
from tests.support.chart import DEPLOY, ROOT

from forebay.cli.autoscale_config import ProcessTable, load_autoscale_settings
from forebay.cli.config import load_gateway_settings

pytestmark = [pytest.mark.slow, pytest.mark.blocks]

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = DEPLOY / "compose.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = Path(sysconfig.get_path("scripts"))
TOKEN = "0123456789abcdef"  # noqa: S105 - of nobody
SECONDS = {"s": 1, "m": 60}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=100)


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments, each on one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def of(name: str) -> list[str]:
    return [argument for each, argument in instructions() if each == name]


# --- the image -------------------------------------------------------------------------------------------------------


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    done = run(SCRIPTS / "hadolint", DEPLOY / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_finds_nothing_in_the_dockerfile_on_the_page() -> None:
    page = (ROOT / "docs" / "operate" / "deploy" / "containers.md").read_text()
    (dockerfile,) = re.findall(r"^```dockerfile\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    command = (SCRIPTS / "hadolint", "-")
    done = subprocess.run(command, input=dockerfile, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"FROM forebay:{PROJECT['version']}" in dockerfile


def test_the_base_has_a_version() -> None:
    images = [argument.split()[0] for argument in of("FROM")]
    assert len(images) > 1
    assert len(set(images)) == 1
    assert re.fullmatch(r"python:3\.13-slim-[a-z]+", images[0])


def test_it_runs_as_nobody_in_particular_and_stops_on_sigterm() -> None:
    uid = {"10001:10001"}
    assert set(of("USER")) == uid
    assert of("STOPSIGNAL") == ["SIGTERM"]
    assert of("ENTRYPOINT") == ['["forebay"]']
    (check,) = of("HEALTHCHECK")
    assert "/opt/forebay/bin/healthcheck.py" in check


def test_it_has_the_extras_that_its_commands_need() -> None:
    (extras,) = [argument.removeprefix("EXTRAS=").split(",") for argument in of("ARG")]
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    assert {"gateway", "kubernetes", "redis", "sqs"} <= set(extras)


def copied(into: Path) -> None:
    """Copy what the first stage copies, and the ignore file lets through."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    ignored = [line for line in lines if line and not line.startswith(("#", "!"))]
    assert ignored == ["*", "**/__pycache__"]
    kept = [line[1:] for line in lines if line.startswith("!")]
    first = next(at for at, (name, _) in enumerate(instructions()) if name == "FROM")
    second = next(at for at, (name, _) in enumerate(instructions()) if name == "FROM" and at > first)
    for name, argument in instructions()[first:second]:
        if name != "COPY":
            continue
        *sources, target = argument.split()
        for source in sources:
            assert any(fnmatch.fnmatch(source, each) or source.startswith(f"{each}/") for each in kept), source
            to = into / target / (source if target == "./" else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, to)


def test_the_wheel_is_built_from_what_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "src"
    copied(source)
    assert (source / "requirements" / "dev.txt").is_file()
    wheels = tmp_path / "wheels"
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(*command, "--wheel-dir", wheels, ".", cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("forebay-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "forebay/cli/autoscale.py" in names
    assert "forebay/overflow/redis_script.lua" in names
    assert not [name for name in names if "__pycache__" in name]


def test_everything_else_that_is_copied_is_let_through() -> None:
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for argument in of("COPY"):
        if "--from=" not in argument:
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in kept


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def health() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (302, 1)])
def test_the_health_check_asks_healthz(
    health: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    monkeypatch.setattr(_Health, "status", status)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is not asked
    done = run(sys.executable, DEPLOY / "healthcheck.py", FOREBAY_HEALTH_PORT=str(health.server_port))
    assert done.returncode == code
    assert done.stdout == f"/healthz on port {health.server_port}: {status}\n"


def test_the_health_check_fails_where_nothing_listens() -> None:
    done = run(sys.executable, DEPLOY / "healthcheck.py", FOREBAY_HEALTH_PORT="1")
    assert done.returncode == 1
    assert "on port 1: " in done.stderr


# --- compose.yaml ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Return the services of compose.yaml, as Docker Compose reads them."""
    command = (SCRIPTS / "docker-compose", "--file", COMPOSE, "--profile", "autoscale", "config", "--format", "json")
    done = run(*command, FOREBAY_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["services"]
    assert isinstance(found, dict)
    return found


def test_docker_compose_knows_every_key(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace_periods", 1))
    done = run(SCRIPTS / "docker-compose", "--file", wrong, "config", "--quiet", FOREBAY_TOKEN=TOKEN)
    assert done.returncode != 0
    assert "stop_grace_periods" in done.stderr


def test_it_asks_for_a_token() -> None:
    done = run(SCRIPTS / "docker-compose", "--file", COMPOSE, "config", "--quiet", FOREBAY_TOKEN="")
    assert done.returncode != 0
    assert "set it to a token of 16 characters or more" in done.stderr


def test_images_have_versions_and_that_of_the_library(services: dict[str, Any]) -> None:
    assert {each["image"] for each in services.values()} == {f"forebay:{PROJECT['version']}", "redis:7.4"}


def test_services_are_checked_limited_and_confined(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name


def test_nothing_is_published_beyond_this_machine(services: dict[str, Any]) -> None:
    published = {
        (name, port["host_ip"], port["target"]) for name, each in services.items() for port in each.get("ports", ())
    }
    assert published == {("gateway", "127.0.0.1", 8787)}
    assert services["redis"]["networks"].keys() == {"tasks"}


def seconds(duration: str) -> float:
    return sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"([\d.]+)([ms])", duration))


def mounted(service: dict[str, Any], path: str) -> Path:
    """Return the file here that a service has at a path."""
    for volume in service["volumes"]:
        if path == volume["target"] or path.startswith(f"{volume['target']}/"):
            return Path(volume["source"] + path[len(volume["target"]) :])
    raise AssertionError(f"{path} is not mounted")


def test_the_gateway_can_run_its_command(services: dict[str, Any]) -> None:
    service = services["gateway"]
    name, options = chart.parse_command(service["command"])
    assert name == "gateway"
    settings = load_gateway_settings(mounted(service, str(options["config"])))
    assert settings.token(service["environment"]) == TOKEN
    assert settings.listen == f"0.0.0.0:{service['ports'][0]['target']}"
    assert seconds(service["stop_grace_period"]) >= settings.drain_timeout + 10


def test_workers_can_run_their_command(services: dict[str, Any]) -> None:
    service = services["worker"]
    name, options = chart.parse_command(service["command"])
    module, _, function = options["supervisor"].partition(":")
    assert name == "worker"
    assert f"def {function}()" in mounted(service, f"/app/{module}.py").read_text()
    assert options["listen"] == f"0.0.0.0:{service['environment']['FOREBAY_HEALTH_PORT']}"
    assert seconds(service["stop_grace_period"]) >= options["drain_timeout"] + 10


def test_the_autoscaler_can_run_its_command(services: dict[str, Any]) -> None:
    service = services["autoscaler"]
    name, options = chart.parse_command(service["command"])
    assert name == "autoscale"
    assert options["listen"] == f"0.0.0.0:{service['environment']['FOREBAY_HEALTH_PORT']}"
    settings = load_autoscale_settings(mounted(service, str(options["config"])))
    assert settings.autoscaler.overflow_url(service["environment"]) == "redis://redis:6379/0"
    assert isinstance(settings.target, ProcessTable)
    assert settings.target.drain_timeout is not None
    assert seconds(service["stop_grace_period"]) >= settings.target.drain_timeout + 10
    slots = re.search(r"^SLOTS = (\d+)", (DEPLOY / "app" / "app.py").read_text(), re.MULTILINE)
    assert slots is not None
    assert settings.autoscaler.seats == int(slots[1])


# --- the programs that it would run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflow() -> Iterator[str]:
    """Return the URL of an overflow on a Redis with the options of compose.yaml."""
    if why := redis_servers.missing():
        pytest.skip(why)
    with redis_servers.redis_server() as server:
        yield server.url


def forebay(*arguments: str, overflow: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``forebay`` as the image does, in the folder of the application."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "FOREBAY_OVERFLOW": overflow, **environment}
    command = [sys.executable, "-m", "forebay.cli", *arguments]
    return subprocess.Popen(
        command, cwd=DEPLOY / "app", env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def stopped(process: subprocess.Popen[str]) -> int:
    """Stop a process as Docker and Kubernetes do; return its exit status."""
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=60.0)
    finally:
        process.kill()
    return process.returncode


def until_healthy(process: subprocess.Popen[str], port: int) -> None:
    def healthy() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return run(sys.executable, DEPLOY / "healthcheck.py", FOREBAY_HEALTH_PORT=str(port)).returncode == 0

    redis_servers.until(healthy, f"port {port} is healthy")


def submit(overflow: str) -> str:
    """Have the application submit tasks; return what it prints when they are done."""
    return run(sys.executable, "app.py", "20", cwd=DEPLOY / "app", FOREBAY_OVERFLOW=overflow).stdout


def here(text: str, port: int) -> str:
    """Return an argument with an address of this machine."""
    return re.sub(r"0\.0\.0\.0:\d+", f"127.0.0.1:{port}", text)


def test_the_gateway_of_the_chart_is_probed_by_its_address_and_stops_in_order(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('[targets.openai]\nurl = "https://api.openai.com"\n')
    gateway = {"enabled": True, "token": {"secretName": "token"}, "config": config.read_text()}
    objects = chart.render({"redis": {"enabled": False}, "worker": {"enabled": False}, "gateway": gateway})
    ((_, container),) = chart.containers(objects)
    port = redis_servers.free_port()
    arguments = [here(each, port).replace("/etc/forebay/gateway.toml", str(config)) for each in container["args"]]
    process = forebay(*arguments, overflow="", FOREBAY_TOKEN=TOKEN)
    try:
        until_healthy(process, port)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
        for path, status in (
            ("/healthz", 200),
            ("/readyz", 200),
            ("/metrics", 401),
        ):  # as the kubelet asks: without the token
            connection.request("GET", path, headers={"Host": f"10.1.2.3:{port}", "User-Agent": "kube-probe/1.37"})
            response = connection.getresponse()
            response.read()
            assert response.status == status
        connection.close()
    finally:
        status = stopped(process)
    assert status == 0


def test_workers_run_the_tasks_of_the_application(services: dict[str, Any], overflow: str) -> None:
    port = redis_servers.free_port()
    worker = forebay(*(here(each, port) for each in services["worker"]["command"]), overflow=overflow)
    try:
        until_healthy(worker, port)
        assert submit(overflow) == "20 of 20 tasks are done\n"
    finally:
        status = stopped(worker)
    assert status == 0


def test_the_autoscaler_starts_workers_for_them(services: dict[str, Any], overflow: str) -> None:
    port, service = redis_servers.free_port(), services["autoscaler"]
    _, options = chart.parse_command(service["command"])
    local = str(mounted(service, str(options["config"])))
    arguments = [local if each == str(options["config"]) else here(each, port) for each in service["command"]]
    autoscaler = forebay(*arguments, overflow=overflow)
    try:
        until_healthy(autoscaler, port)
        assert submit(overflow) == "20 of 20 tasks are done\n"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
        connection.close()
    finally:
        status = stopped(autoscaler)
    assert status == 0
    found = re.search(r'^forebay_desired_replicas{target="process:app:make_supervisor"} (\d+)$', metrics, re.MULTILINE)
    assert found is not None, metrics
    assert 1 <= int(found[1]) <= 4
