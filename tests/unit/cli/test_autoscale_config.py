"""The configuration of ``forebay autoscale``, and the error for each mistake in it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forebay.cli.app import app
from forebay.cli.autoscale_config import (
    AutoscalerTable,
    AutoscaleSettings,
    Ec2Table,
    KubernetesLeaderTable,
    KubernetesTable,
    ProcessTable,
    StateLeaderTable,
    load_autoscale_settings,
)
from forebay.cli.toml_document import InvalidConfiguration
from forebay.errors import InvalidSetting

EXAMPLE = Path(__file__).parents[3] / "examples" / "autoscale.toml"
AUTOSCALER = '[autoscaler]\noverflow = "sqlite:///a.db"\ntask_types = ["work"]\nmaximum = 3\n'
TARGETS = "[target.kubernetes], [target.ec2], [target.process]"
TARGET = '[target.kubernetes]\nworkload = "deployment/workers"\n'


def write(text: str, tmp_path: Path) -> Path:
    file = tmp_path / "autoscale.toml"
    file.write_text(textwrap.dedent(text))
    return file


def problems(text: str, tmp_path: Path) -> list[str]:
    """Return the problems of a file, with ``f`` for its name."""
    file = write(text, tmp_path)
    with pytest.raises(InvalidConfiguration) as rejected:
        load_autoscale_settings(file)
    return str(rejected.value).replace(str(file), "f").splitlines()


def test_the_example_is_read() -> None:
    assert load_autoscale_settings(EXAMPLE) == AutoscaleSettings(
        autoscaler=AutoscalerTable(
            overflow_env="FOREBAY_OVERFLOW", task_types=("write",), seats=4, minimum=0, maximum=20, service=30.0
        ),
        target=KubernetesTable(workload="deployment/workers", report_port=9000),
        leader=KubernetesLeaderTable(name="forebay-autoscaler"),
    )


def test_processes_with_a_lease_in_a_store(tmp_path: Path) -> None:
    text = AUTOSCALER + '[target.process]\nsupervisor = "app:supervisor"\n[leader.state]\nurl_env = "STATE"\n'
    settings = load_autoscale_settings(write(text, tmp_path))
    assert settings.target == ProcessTable(supervisor="app:supervisor")
    assert settings.leader == StateLeaderTable(url_env="STATE")
    assert settings.target.target().name == "process:app:supervisor"


def test_an_auto_scaling_group(tmp_path: Path) -> None:
    text = (
        AUTOSCALER + '[target.ec2]\ngroup = "workers"\nregion = "eu-west-1"\ndrain_hook = "drain"\nreport_port = 9000\n'
    )
    settings = load_autoscale_settings(write(text, tmp_path))
    assert settings.target == Ec2Table(group="workers", region="eu-west-1", drain_hook="drain", report_port=9000)
    assert settings.target.target().name == "ec2:workers"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["f: autoscaler needs maximum", "f: autoscaler needs task_types"]),
        (
            AUTOSCALER,
            [f"f: there is no target: add one of the tables {TARGETS}"],
        ),
        (AUTOSCALER + "target = 3\n", ["f:5: autoscaler.target is not a setting; known settings are"]),
        (
            "target = 3\n" + AUTOSCALER,
            [f"f:1: target must be one of the tables {TARGETS}"],
        ),
        (AUTOSCALER + "[target.kubernets]\n", ["f:5: target.kubernets is not a setting; did you mean kubernetes?"]),
        (AUTOSCALER + "[target.kubernetes]\n", ["f:5: target.kubernetes needs workload"]),
        (
            AUTOSCALER + TARGET + '[target.process]\nsupervisor = "a:b"\n',
            [f"f:5: target has 2 tables; keep one of {TARGETS}"],
        ),
        (
            AUTOSCALER + "publish_only = true\n" + TARGET + "[leader.kubernetes]\n",
            ["f:8: leader and autoscaler.publish_only exclude each other: leave one of them out, since nobody acts"],
        ),
        (
            AUTOSCALER + TARGET.replace("deployment", "daemonset"),
            ["f:6: target.kubernetes.workload is 'daemonset/workers'; it must be \"deployment/NAME\" or"],
        ),
        (
            AUTOSCALER.replace("3", "0") + TARGET,
            ["f:4: autoscaler.maximum is 0; it must be a whole number of at least 1"],
        ),
        (
            AUTOSCALER + "minimum = 9\n" + TARGET,
            ["f:4: autoscaler.maximum is 3; it must be at least the minimum, 9"],
        ),
        (
            AUTOSCALER + 'maximun = 3\nload = "a"\n' + TARGET,
            ["f:5: autoscaler.maximun", "f:6: autoscaler.load is a string"],
        ),
        (
            AUTOSCALER + 'overflow_env = "A"\n' + TARGET,
            ["f:2: autoscaler.overflow is 'given, and overflow_env too'; it must be a URL, unless overflow_env names"],
        ),
        (
            AUTOSCALER.replace("overflow =", "overflow_env =") + TARGET,
            ["f:2: autoscaler.overflow_env is 'something else'; it must be the name of an environment variable; a URL"],
        ),
        (
            AUTOSCALER + TARGET + '[leader.state]\nurl = "redis://h"\nurl_env = "A"\n',
            ["f:8: leader.state.url is 'given, and url_env too'; it must be a URL, unless url_env names"],
        ),
        (
            AUTOSCALER + TARGET + '[leader.state]\nurl_env = "redis://:secret@h"\n',
            ["f:8: leader.state.url_env is 'something else'; it must be the name of an environment variable"],
        ),
        (AUTOSCALER.replace('["work"]', '["a", ""]') + TARGET, ["f:3: autoscaler.task_types is a tuple; it must be"]),
        (
            AUTOSCALER.replace('["work"]', '["a", "a"]') + TARGET,
            ["f:3: autoscaler.task_types is a tuple; it must be a"],
        ),
        (AUTOSCALER.replace('["work"]', "[]") + TARGET, ["f:3: autoscaler.task_types is a tuple; it must be a list"]),
        (AUTOSCALER + TARGET + "[leader]\n", ["f:7: there is no lease in it: leave [leader] out, or add one of the"]),
        (AUTOSCALER + TARGET + "[leader.kubernetes]\nduration = 1e9\n", ["f:8: leader.kubernetes.duration is 1000000"]),
        (AUTOSCALER + TARGET + "[leader.kubernetes]\nduration = 0\n", ["f:8: leader.kubernetes.duration is 0"]),
        (AUTOSCALER + TARGET + "[leader.state]\n", ["f:7: leader.state.url is not given; it must be a URL"]),
        (AUTOSCALER + TARGET + "[leader.redis]\n", ["f:7: leader.redis is not a setting"]),
    ],
)
def test_mistakes_have_their_lines(text: str, expected: list[str], tmp_path: Path) -> None:
    found = problems(text, tmp_path)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_variables_of_the_environment() -> None:
    table = AutoscalerTable(overflow_env="OVERFLOW", task_types=("work",), maximum=1)
    assert table.overflow_url({"OVERFLOW": "redis://there"}) == "redis://there"
    with pytest.raises(InvalidSetting, match="environment variable that is set"):
        table.overflow_url({})
    state = StateLeaderTable(url_env="STATE")
    assert state.shard_url({"STATE": "redis://there"}) == "redis://there"
    with pytest.raises(InvalidSetting, match="environment variable that is set"):
        state.shard_url({"STATE": ""})
    with pytest.raises(InvalidSetting, match="that the other autoscalers see, too"):
        StateLeaderTable(url="memory://").check_shard({})


def test_check_prints_what_it_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOREBAY_OVERFLOW", raising=False)
    done = CliRunner().invoke(app, ["autoscale", "--config", str(EXAMPLE), "--check"])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "tasks of write in the overflow in $FOREBAY_OVERFLOW, which is not set",
        "kubernetes:deployment/workers: 0 to 20 replicas of 4 slots; the holder of the lease forebay-autoscaler acts",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (AUTOSCALER.replace("sqlite:///a.db", "redsi://:secret@h/0") + TARGET, "there is no store 'redsi'"),
        (AUTOSCALER.replace("sqlite:///a.db", "memory://") + TARGET, "it must be one that other processes use"),
        (AUTOSCALER + TARGET + '[leader.state]\nurl = "redsi://:secret@h"\n', "cannot be opened"),
        (AUTOSCALER + TARGET + '[leader.state]\nurl = "memory://"\n', "that the other autoscalers see, too"),
    ],
)
def test_check_finds_urls_that_cannot_be_used_and_shows_no_password(text: str, why: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["autoscale", "--config", str(write(text, tmp_path)), "--check"])
    assert done.exit_code == 2
    assert why in done.stderr
    assert "secret" not in done.output


def test_check_says_which_variables_are_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE", raising=False)
    file = write(AUTOSCALER + TARGET + '[leader.state]\nurl_env = "STATE"\n', tmp_path)
    done = CliRunner().invoke(app, ["autoscale", "--config", str(file), "--check"])
    lease = "the holder of the lease autoscaler/deployment/workers acts, in $STATE, which is not set\n"
    assert (done.exit_code, done.stdout.endswith(lease)) == (0, True)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (TARGET, "forebay-autoscaler-deployment-workers"),
        (TARGET + 'namespace = "agents"\n', "forebay-autoscaler-agents-deployment-workers"),
        ('[target.ec2]\ngroup = "My_Group "\n', "forebay-autoscaler-ec2-my-group"),
        (f'[target.ec2]\ngroup = "{"a" * 300}"\n', "forebay-autoscaler-ec2-" + "a" * 230),
    ],
)
def test_each_target_has_a_lease_of_its_own(target: str, name: str, tmp_path: Path) -> None:
    settings = load_autoscale_settings(write(AUTOSCALER + target + "[leader.kubernetes]\n", tmp_path))
    assert isinstance(settings.leader, KubernetesLeaderTable)
    assert settings.leader.lease_name(settings.lease_target) == name
    settings.leader.lease(settings.lease_target)  # it may be one


def test_check_says_that_it_only_publishes(tmp_path: Path) -> None:
    file = write(AUTOSCALER + "publish_only = true\n" + TARGET, tmp_path)
    done = CliRunner().invoke(app, ["autoscale", "--config", str(file), "--check"])
    assert done.stdout.endswith("1 to 3 replicas of 1 slots; their number is published, and something else sets it\n")


def test_an_address_to_listen_on_that_is_none_is_a_line() -> None:
    done = CliRunner().invoke(app, ["autoscale", "--config", str(EXAMPLE), "--listen", "here"])
    assert (done.exit_code, done.stderr) == (2, "forebay: --listen: it must be HOST:PORT, such as 0.0.0.0:9000\n")


@pytest.mark.parametrize(
    ("text", "status", "why"),
    [
        (AUTOSCALER + TARGET.replace("deployment", "a"), 2, "target.kubernetes.workload"),
        (AUTOSCALER.replace("sqlite:///a.db", "memory://") + TARGET, 2, "it must be one that other processes use"),
        (AUTOSCALER.replace("sqlite:///a.db", "nonsense") + TARGET, 2, "does not begin with the name of a store"),
        (
            AUTOSCALER.replace("sqlite:///a.db", "UNSET").replace("overflow =", "overflow_env =") + TARGET,
            2,
            "that is set",
        ),
        (AUTOSCALER + TARGET, 1, "Kubernetes cannot be used: its configuration is missing or invalid"),
    ],
)
def test_what_it_cannot_begin_with_is_a_line(
    text: str, status: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text.replace("sqlite:///a.db", f"sqlite:///{tmp_path}/a.db")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    done = CliRunner().invoke(app, ["autoscale", "--config", str(write(text, tmp_path))])
    assert done.exit_code == status
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", ":9000", "127.0.0.1:90000"])
def test_a_worker_listens_at_an_address(address: str) -> None:
    done = CliRunner().invoke(app, ["worker", "app:supervisor", "--listen", address])
    assert (done.exit_code, done.stderr) == (2, "forebay: --listen: it must be HOST:PORT, such as 0.0.0.0:9000\n")
