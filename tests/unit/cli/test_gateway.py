"""``forebay gateway``, without starting a gateway."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from forebay import gateway
from forebay.cli.app import app
from forebay.gateway import (
    ContextSettings,
    DeploymentSettings,
    FallbackSettings,
    GatewaySettings,
    KeySettings,
    ModelSettings,
    QuotaSettings,
    TargetSettings,
    TenantSettings,
)
from forebay.quota import Price

OPENAI = ("--target", "openai=https://api.openai.com")
PAGE = Path(__file__).parents[3] / "docs" / "gateway.md"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory in which the commands keep what survives them."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "forebay"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["gateway", *arguments])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[GatewaySettings]:
    """Return the settings with which gateways were started."""
    settings: list[GatewaySettings] = []

    def serve(started: GatewaySettings, *, ready: Callable[[Any], object], **_: object) -> int:
        settings.append(started)
        ready(SimpleNamespace(port=4242))
        return 7

    monkeypatch.setattr(gateway, "missing_libraries", list)
    monkeypatch.setattr(gateway, "serve", serve)
    return settings


def test_it_serves_with_the_settings_of_options_and_file(
    served: list[GatewaySettings], tmp_path: Path, state: Path
) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text("[targets.anthropic]\nurl = 'https://api.anthropic.com'\nrpm = 5\n")
    done = run(
        *OPENAI,
        *("--config", str(file), "--listen", "0.0.0.0:8788", "--token-env", "MINE", "--share-keys"),
        *("--rpm", "500", "--rpm", "anthropic=6", "--input-tpm", "1", "--output-tpm", "2", "--tpm", "3"),
        *("--max-concurrent", "4", "--budget-usd", "25", "--drain-timeout", "90"),
    )
    kept = state / "gateway-8788.db"
    assert (done.exit_code, done.output.splitlines()) == (
        7, ["listening on http://0.0.0.0:4242", f"what calls cost is kept in {kept}"]
    )  # fmt: skip
    limits: dict[str, Any] = {
        "input_tpm": 1,
        "output_tpm": 2,
        "tpm": 3,
        "max_concurrent": 4,
        "budget_usd": 25.0,
        "share_keys": True,
    }
    assert served == [
        GatewaySettings(
            listen="0.0.0.0:8788",
            token_env="MINE",
            drain_timeout=90.0,
            spend_log=f"sqlite:///{kept}",
            targets=(
                TargetSettings(name="anthropic", url="https://api.anthropic.com", rpm=6, **limits),
                TargetSettings(name="openai", url="https://api.openai.com", rpm=500, **limits),
            ),
        )
    ]


def test_a_mistake_is_reported_and_nothing_is_started(served: list[GatewaySettings]) -> None:
    done = run(*OPENAI, "--rpm", "0")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "--rpm: targets.openai.rpm is 0; it must be a whole number of at least 1\n"
    assert served == []


def test_an_option_overrides_how_long_the_file_lets_calls_drain(served: list[GatewaySettings], tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text("[gateway]\ndrain_timeout = 5\n")
    run(*OPENAI, "--config", str(file), "--drain-timeout", "90")
    assert served[0].drain_timeout == 90.0
    done = run(*OPENAI, "--drain-timeout", "-1")
    assert (done.exit_code, done.stderr) == (
        2, "--drain-timeout: gateway.drain_timeout is -1.0; it must be a positive number of seconds\n"
    )  # fmt: skip


def test_check_prints_the_configuration_and_starts_nothing(
    served: list[GatewaySettings], tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINE", raising=False)
    file = tmp_path / "forebay.toml"
    file.write_text("""
        [targets.openai]
        url = "https://api.openai.com"
        budget_usd = 1_000
        [targets.openai.models."gpt*"]
        input_tpm = 200_000
    """)
    done = run("--config", str(file), "--check", "--target", "mine=http://h.example", "--token-env", "MINE")
    assert (done.exit_code, served) == (1, [])
    assert done.stdout.splitlines() == [
        "listening on 127.0.0.1:8787; callers need the token in $MINE, which is not set",
        "may set priority, deadline, tenant and task: anyone",
        f"what calls cost is kept in {state / 'gateway-8787.db'}",
        "access log: text to stdout",
        "openai: https://api.openai.com; rules of openai; accounts of its own for each API key",
        "    1,000 USD per day",
        "    200,000 input tokens per minute of gpt*",
        "mine: http://h.example; rules of openai-compatible; accounts of its own for each API key",
        "    all limits are learned from headers and 429s",
    ]
    keys = f"sqlite:///{tmp_path / 'keys.db'}"
    assert "deadline, tenant and task: as each key says\n" in run(*OPENAI, "--check", "--keys", keys).stdout
    token = tmp_path / "token"
    assert f"the token in {token}, which does not exist\n" in run(*OPENAI, "--check", "--token-file", str(token)).stdout
    token.touch()
    assert f"the token in {token}\n" in run(*OPENAI, "--check", "--token-file", str(token)).stdout
    file.write_text("""
        [targets.openai]
        url = "https://api.openai.com"
        fallback = [{ target = "mine", api_key_env = "MINE" }]
    """)
    summary = run("--config", str(file), "--check", "--target", "mine=http://h.example").stdout
    assert "fall back to mine, with the API key in $MINE, which is not set\n" in summary
    assert "callers need no token\n" in run(*OPENAI, "--check").stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--budget-usd", "5", "--spend-log", "none"), "kept in memory: a restart refills the budgets\n"),
        (("--spend-log", "sqlite:////var/lib/spend.db"), "kept in /var/lib/spend.db\n"),
        (("--budget-usd", "5", "--spend-log", "sqlite:////var/lib/spend.db"), "kept in /var/lib/spend.db\n"),
    ],
)
def test_where_spend_is_kept_may_be_chosen(given: tuple[str, ...], says: str) -> None:
    done = run(*OPENAI, *given, "--check")
    assert f"what calls cost is {says}" in done.stdout


def test_gateways_on_any_free_port_do_not_count_each_others_calls(served: list[GatewaySettings], state: Path) -> None:
    done = run(*OPENAI, "--budget-usd", "5", "--listen", "127.0.0.1:0")
    assert "what calls cost is kept in memory: a restart refills the budgets\n" in done.output
    assert served[0].spend_log is None
    assert not state.exists()


def test_without_a_budget_no_file_is_made(served: list[GatewaySettings], state: Path) -> None:
    assert "kept" not in run(*OPENAI).output
    assert served[0].spend_log is None
    assert not state.exists()


@pytest.mark.parametrize("of", ["keys", "tenant"])
def test_spend_is_kept_by_default_if_only_keys_or_tenants_have_budgets(
    served: list[GatewaySettings], tmp_path: Path, state: Path, of: str
) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(
        "[tenants.acme]\nbudget_usd = 5\n" if of == "tenant" else f"[gateway]\nkeys = 'sqlite:///{tmp_path}/keys.db'\n"
    )
    kept = state / "gateway-8787.db"
    assert f"what calls cost is kept in {kept}\n" in run(*OPENAI, "--config", str(file)).stdout
    assert served[0].spend_log == f"sqlite:///{kept}"
    said = run(*OPENAI, "--config", str(file), "--check", "--spend-log", "none").stdout
    assert "what calls cost is kept in memory: a restart refills the budgets\n" in said


def test_the_directory_of_the_default_file_is_made_and_of_no_other(
    served: list[GatewaySettings], state: Path, tmp_path: Path
) -> None:
    assert run(*OPENAI, "--budget-usd", "5", "--spend-log", f"sqlite:///{tmp_path}/other/spend.db").exit_code == 7
    assert not (tmp_path / "other").exists()
    assert run(*OPENAI, "--budget-usd", "5").exit_code == 7
    assert state.is_dir()
    assert len(served) == 2


@pytest.mark.usefixtures("served")
def test_a_directory_that_cannot_be_made_is_an_error_with_advice(state: Path) -> None:
    state.parent.write_text("a file is in its place")
    done = run(*OPENAI, "--budget-usd", "5")
    assert done.exit_code == 1
    assert "its directory cannot be made" in done.stderr
    assert "give --spend-log none to keep no spend" in done.stderr


def test_an_invalid_spend_log_is_reported(served: list[GatewaySettings]) -> None:
    done = run(*OPENAI, "--spend-log", "redis://host")
    assert done.exit_code == 2
    assert done.stderr.startswith("--spend-log: gateway.spend_log is 'redis://host'; it must be a file, such as")
    assert served == []


@pytest.mark.usefixtures("served")
def test_check_says_where_keys_are_and_shows_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELD", "sk-held")
    file = tmp_path / "forebay.toml"
    file.write_text("""
        [targets.openai]
        url = "https://api.openai.com"
        api_key_env = "HELD"
        [targets.anthropic]
        url = "https://api.anthropic.com"
        api_key_file = "anthropic.key"
    """)
    keys = tmp_path / "keys.db"
    done = run("--config", str(file), "--check", "--keys", f"sqlite:///{keys}")
    assert done.exit_code == 1
    assert f"callers need a key of {keys}, which does not exist\n" in done.stdout
    assert "calls are sent with the API key in $HELD\n" in done.stdout
    assert f"calls are sent with the API key in {tmp_path / 'anthropic.key'}, which does not exist\n" in done.stdout
    assert "sk-held" not in done.stdout
    keys.touch()
    file.write_text("gateway.require_key = false\ntargets.openai.url = 'https://api.openai.com'")
    summary = run("--config", str(file), "--check", "--keys", f"sqlite:///{keys}").stdout
    assert f"callers need no token, or a key of {keys}\n" in summary


def test_check_prints_aliases_pools_and_keys(
    served: list[GatewaySettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_A", "sk-secret")
    monkeypatch.delenv("KEY_B", raising=False)
    file = tmp_path / "forebay.toml"
    file.write_text("""
        [targets.openai]
        url = "https://api.openai.com"
        keys = [{ api_key_env = "KEY_A", name = "paid", rpm = 300, max_concurrent = 8 },
                { api_key_env = "KEY_B", weight = 2 }]
        [targets.other]
        url = "https://h.example"
        [models]
        fast = "gpt-4o-mini"
        [models."llama-*"]
        target = "other"
        [models.smart]
        pool = [{ target = "openai", model = "gpt-4o" }, { target = "other", weight = 3 }]
    """)
    done = run("--config", str(file), "--check")
    assert (done.exit_code, served) == (1, [])
    assert done.stdout.splitlines()[3:] == [
        "openai: https://api.openai.com; rules of openai; calls are sent with the API keys of the gateway",
        "    key paid in $KEY_A: 300 requests per minute, 8 calls in flight",
        "    key KEY_B in $KEY_B, which is not set: weight 2",
        "other: https://h.example; rules of openai-compatible; accounts of its own for each API key",
        "    all limits are learned from headers and 429s",
        "model fast: gpt-4o-mini at the target of the call's path",
        "models llama-*: the same name at other",
        "model smart: shared by 2 deployments",
        "    gpt-4o at openai by 2 keys",
        "    the same name at other, weight 3",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[models.fast]\ntarget = 'b'", "models.fast.target is 'b'; it must be an existing target: openai, anthropic"),
        ("[models]\nfast = 'fast'", "models.fast.model is 'fast'; it must be another name than the alias"),
        ("[models]\nfast = 3", "models.fast is 3; it must be a table"),
        (
            "[models.fast]\npool = [{target = 'openai'}, {target = 'anthropic'}]",
            "it must be made of targets with one protocol",
        ),
        ("[models.fast]\npool = [{target = 'openai'}, {target = 'openai', model = 'fast'}]", "different deployments"),
        ("[models.fast]\nmodel = 'x'\npool = [{target = 'openai'}]", "left out if there is a target or a model"),
        ("[models.fast]\npool = [{target = 'openai', weight = 0}]", "it must be a positive number of shares"),
        ("[models.'gpt-*']\ntarget = 'openai'\nmodel = 'gpt-*'", "it must be the name of one model, not a pattern"),
        ("[models.fast]\npool = [{target = 'openai', model = '*'}, {target = 'openai'}]", "not a pattern"),
        ("[models.fast]\ntargt = 'openai'", "models.fast.targt is not a setting; did you mean target?"),
        ("[[targets.openai.keys]]\nname = 'a'", "needs api_key_env"),
        ("[targets.openai]\nkeys = [{api_key_env = 'A'}, {api_key_env = 'A'}]", "different names and variables"),
        ("[targets.openai]\napi_key_env = 'B'\nkeys = [{api_key_env = 'A'}]", "or all of them here"),
        ("[targets.openai]\nkeys = [{api_key_env = 'A', tpm = 5, strict = true}]", "a setting of the target"),
    ],
)
def test_a_mistake_in_aliases_pools_and_keys_is_reported(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(text)
    done = run("--config", str(file), *OPENAI, "--target", "anthropic=https://api.anthropic.com", "--check")
    assert done.exit_code == 2
    assert problem in done.stderr


HOLDING = """
    [gateway]
    token_env = "CALLERS"
    [targets.openai]
    url = "https://api.openai.com"
    api_key_env = "HELD"
    fallback = [{ target = "mine", api_key_env = "OTHER" }]
    [targets.mine]
    url = "https://h.example"
    keys = [{ api_key_env = "KEY_A" }, { api_key_env = "KEY_B" }]
"""
VARIABLES = ("CALLERS", "HELD", "OTHER", "KEY_A", "KEY_B")


@pytest.mark.parametrize("missing", VARIABLES)
@pytest.mark.parametrize("value", [None, " "], ids=["unset", "empty"])
def test_check_fails_if_a_variable_that_is_needed_is_missing(
    missing: str, value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(HOLDING)
    for name in VARIABLES:
        monkeypatch.setenv(name, f"a-secret-of-{name.lower()}")
    assert run("--config", str(file), "--check").exit_code == 0
    if value is None:
        monkeypatch.delenv(missing)
    else:
        monkeypatch.setenv(missing, value)
    done = run("--config", str(file), "--check")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert re.match(rf"forebay: .* (the|set the) environment variable {missing}[,:] ", line)
    assert "set it where" in line or "set the environment" in line


def test_check_names_every_variable_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(HOLDING)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    done = run("--config", str(file), "--check")
    assert done.exit_code == 1
    assert [next(name for name in VARIABLES if name in line) for line in done.stderr.splitlines()] == list(VARIABLES)


def test_check_fails_if_two_keys_of_a_target_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(HOLDING)
    for name in VARIABLES:
        monkeypatch.setenv(name, "the-same-for-each-of-them")
    done = run("--config", str(file), "--check")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "'KEY_B' has the same one as 'KEY_A'" in done.stderr
    assert "the-same" not in done.output


def test_check_fails_if_the_file_of_keys_is_missing_or_none(tmp_path: Path) -> None:
    keys = tmp_path / "keys.db"
    done = run(*OPENAI, "--check", "--keys", f"sqlite:///{keys}")
    assert done.exit_code == 1
    assert f"{keys}" in done.stderr
    assert "forebay keys create" in done.stderr
    keys.write_text("name,key")
    assert run(*OPENAI, "--check", "--keys", f"sqlite:///{keys}").exit_code == 1


@pytest.mark.usefixtures("served")
def test_check_fails_for_a_reference_to_a_variable_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM_URL", raising=False)
    file = tmp_path / "forebay.toml"
    file.write_text("targets.openai.url = '${LLM_URL}'")
    done = run("--config", str(file), "--check")
    assert done.exit_code == 2
    assert "needs the environment variable LLM_URL, which is not set; set it" in done.stderr


def test_check_fails_if_there_is_a_mistake() -> None:
    assert run("--check").exit_code == 2


@pytest.mark.usefixtures("served")
def test_missing_libraries_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "missing_libraries", lambda: ["aiohttp"])
    done = run(*OPENAI)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == 'forebay: this command needs aiohttp. To install: pip install "forebay[gateway]"\n'
    assert run(*OPENAI, "--check").exit_code == 0


def test_a_failed_start_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(settings: GatewaySettings, **_: object) -> int:
        settings.token({})
        return 0

    monkeypatch.setattr(gateway, "missing_libraries", list)
    monkeypatch.setattr(gateway, "serve", serve)
    done = run(*OPENAI, "--token-env", "MINE")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "forebay: The token that callers present cannot be read from the environment variable MINE: "
    )
    assert done.stderr.count("\n") == 1


# --- the page ---


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a line that starts so, without its head."""
    lines = PAGE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    first = next(number for number in range(start, len(lines)) if lines[number].startswith("|"))
    table = lines[first : lines.index("", first)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]


@pytest.mark.parametrize(
    ("heading", "kind", "excluded"),
    [
        ("**`[gateway]`**", GatewaySettings, {"targets", "context", "tenants", "models"}),
        ("**`[gateway.context]`**", ContextSettings, set()),
        ("**`[tenants.NAME]`**", TenantSettings, {"name"}),
        ("**`[targets.NAME]`**", TargetSettings, {"name", "models", "prices", "weights", "fallback", "keys"}),
        ("**`[[targets.NAME.keys]]`**", KeySettings, {"strict"}),
        ("**`[models.NAME]`**, whose", ModelSettings, {"name"}),
        ("**`[[models.NAME.pool]]`**", DeploymentSettings, set()),
        ("**`[targets.NAME.models.PATTERN]`**", QuotaSettings, set()),
        ("**`[targets.NAME.prices.PATTERN]`**", Price, set()),
        ("**`[[targets.NAME.fallback]]`**", FallbackSettings, set()),
    ],
)
def test_the_page_has_all_keys_with_their_defaults(
    heading: str, kind: type[msgspec.Struct], excluded: set[str]
) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(kind) if field.name not in excluded}
    table = rows(heading)
    shown = {row[0].strip("`"): row[1] for row in table}
    assert len(shown) == len(table)
    assert sorted(shown) == sorted(fields)
    for name, default in shown.items():
        if fields[name].required:
            assert default == "needed"
        elif default.startswith("`"):
            value = msgspec.convert(tomllib.loads(f"x = {default.strip('`')}")["x"], fields[name].type)
            assert value == fields[name].default
        else:
            assert fields[name].default is None


def test_the_page_has_all_options() -> None:
    command = typer.main.get_command(app)
    context = typer.Context(command)
    shown = [option for row in rows("| option |") for option in re.findall(r"`(--(?!no-)[\w-]+)", row[0])]
    parameters = command.commands["gateway"].get_params(context)  # type: ignore[attr-defined]
    assert shown == [parameter.opts[0] for parameter in parameters if parameter.opts[0] != "--help"]


def test_the_page_shows_the_errors_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ("", "", "", "[targets.openai]", "url = 'http://h.example'", "", "rpm = '5'", "", "budget = 5", "")
    (tmp_path / "forebay.toml").write_text("\n".join(lines))
    errors = [
        *run("--config", "forebay.toml").stderr.splitlines(),
        *run(*OPENAI, "--listen", "here").stderr.splitlines(),
    ]
    assert len(errors) == 3
    assert "```text\n" + "\n".join(errors) + "\n```\n" in PAGE.read_text()
