"""The settings of a gateway from a file and options, and the error for each mistake in them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from forebay.cli.config import load_gateway_settings
from forebay.cli.toml_document import InvalidConfiguration
from forebay.gateway import ContextSettings, FallbackSettings, GatewaySettings, QuotaSettings, TargetSettings
from forebay.gateway.targets.targets import make_targets
from forebay.quota import Price

EXAMPLE = Path(__file__).parents[3] / "examples" / "forebay.toml"
URL = "https://api.openai.com"
OPENAI = f"openai={URL}"
ANTHROPIC = "anthropic=https://api.anthropic.com"


def problems(text: str, tmp_path: Path, **options: Any) -> list[str]:
    """Return the problems of a file, with ``f`` for its name."""
    file = tmp_path / "forebay.toml"
    file.write_text(textwrap.dedent(text))
    with pytest.raises(InvalidConfiguration) as rejected:
        load_gateway_settings(file, **options)
    return str(rejected.value).replace(str(file), "f").splitlines()


def problem_of(**options: Any) -> str:
    with pytest.raises(InvalidConfiguration) as rejected:
        load_gateway_settings(None, **options)
    return str(rejected.value)


# --- a file ---


def test_the_example_is_read() -> None:
    assert load_gateway_settings(EXAMPLE) == GatewaySettings(
        listen="127.0.0.1:8787",
        max_connections=2000,
        drain_timeout=60.0,
        context=ContextSettings(trust="anyone", tenant_headers=("x-user-id", "x-agent-id")),
        targets=(
            TargetSettings(
                name="openai",
                url=URL,
                budget_usd=25.0,
                tenant_budget_usd=5.0,
                share_keys=True,
                models={
                    "gpt-4o*": QuotaSettings(rpm=500, input_tpm=200_000),
                    "gpt-4o-mini*": QuotaSettings(rpm=5_000),
                    "o3*": QuotaSettings(rpm=100, tpm=100_000),
                },
                fallback=(
                    FallbackSettings(models="gpt-4o", model="gpt-4o-mini"),
                    FallbackSettings(target="llama", model="llama-3.3-70b", load_threshold=0.9),
                ),
            ),
            TargetSettings(name="anthropic", url="https://api.anthropic.com", budget_usd=25.0),
            TargetSettings(
                name="llama",
                url="http://127.0.0.1:8000",
                provider="vllm",
                max_concurrent=16,
                max_wait=20.0,
                prices={"*": Price(input=0.1, output=0.2)},
                weights={"acme": 3.0},
            ),
        ),
    )


def test_every_target_of_the_example_makes_an_upstream() -> None:
    names = [target.upstream.name for target in make_targets(load_gateway_settings(EXAMPLE), {})]
    assert sorted(names) == sorted(["openai", "anthropic", "llama"])


def test_the_path_of_a_token_file_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(f'gateway.token_file = "token"\ntargets.openai.url = "{URL}"\n')
    assert load_gateway_settings(file).token_file == str(tmp_path / "token")
    assert load_gateway_settings(file, gateway={"token_file": "other"}).token_file == "other"
    file.write_text(f'gateway.token_file = "/run/token"\ntargets.openai.url = "{URL}"\n')
    assert load_gateway_settings(file).token_file == "/run/token"
    file.write_text(f'targets.openai = {{ url = "{URL}", api_key_file = "key" }}\n')
    assert load_gateway_settings(file).targets[0].api_key_file == str(tmp_path / "key")


# --- mistakes in a file ---


def test_every_mistake_is_reported_with_its_line(tmp_path: Path) -> None:
    text = """\
        [gateway]
        max_body = 3
        drain_timeout = true

        [targets.openai]
        url = "https://api.openai.com"
        rpm = "many"

        [targets.openai.models."gpt-4o*"]
        rpm = 0
        [targets.b]
        max_wait = 5
    """
    assert problems(text, tmp_path) == [
        "f:2: gateway.max_body is not a setting; did you mean max_body_bytes?",
        "f:3: gateway.drain_timeout is true; it must be a number",
        "f:7: targets.openai.rpm is a string; it must be a whole number",
        'f:10: targets.openai.models."gpt-4o*".rpm is 0; it must be a whole number of at least 1',
        "f:11: targets.b needs url",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("rpn = 5", "targets.openai.rpn is not a setting; did you mean rpm?"),
        ("name = 'x'", "targets.openai.name is not a setting; known settings are rpm, input_tpm, "),
        ("rpm = 1.5", "targets.openai.rpm is 1.5; it must be a whole number"),
        ("rpm = true", "targets.openai.rpm is true; it must be a whole number"),
        ("rpm = -1", "targets.openai.rpm is -1; it must be a whole number of at least 1"),
        ("budget_usd = '25'", "targets.openai.budget_usd is a string; it must be a number"),
        ("budget_usd = 0", "targets.openai.budget_usd is 0.0; it must be a positive number of US dollars"),
        ("budget_usd = inf", "targets.openai.budget_usd is inf; it must be a positive number of US dollars"),
        ("budget_usd = 1979-05-27", "targets.openai.budget_usd is a date; it must be a number"),
        ("share_keys = 1", "targets.openai.share_keys is 1; it must be true or false"),
        ("provider = 'opnai'", "targets.openai.provider is 'opnai'; it must be one of 'openai', "),
        ("models = 5", "targets.openai.models is 5; it must be a table"),
        ("models.x = [1]", "targets.openai.models.x is a list; it must be a table"),
        ("models.x.rps = 1", "targets.openai.models.x.rps is not a setting; did you mean rpm?"),
        ("prices.mine.input = 1", "targets.openai.prices.mine needs output"),
        ("prices.'m 1' = { input = -1, output = 2 }", 'targets.openai.prices."m 1".input is -1.0; it must be a number'),
        ("weights.acme = '3'", "targets.openai.weights.acme is a string; it must be a number"),
        ("weights.'a.b' = 0", 'targets.openai.weights."a.b" is 0.0; it must be a positive number'),
    ],
)
def test_a_mistake_in_a_target_is_reported_with_its_line(line: str, problem: str, tmp_path: Path) -> None:
    (found,) = problems(f"[targets.openai]\nurl = '{URL}'\n# here\n{line}\n", tmp_path)
    assert found.startswith(f"f:4: {problem}")


def test_a_mistake_in_a_fallback_is_reported_with_its_line(tmp_path: Path) -> None:
    text = """\
        [targets.a]
        url = "https://a.example"
        [[targets.a.fallback]]
        model = "fine"
        [[targets.a.fallback]]
        to = "gpt-4o-mini"
        model = "m"
        [[targets.a.fallback]]
        [[targets.a.fallback]]
        model = "m"
        load_threshold = "2"
        [[targets.a.fallback]]
        model = "m"
        load_threshold = 2
    """
    assert problems(text, tmp_path) == [
        (
            "f:6: targets.a.fallback.to is not a setting; known settings are target, model, load_threshold, models,"
            " api_key_env"
        ),
        (
            "f:8: targets.a.fallback.model is not given; it must be given if there is no target: a fallback"
            " needs another model or another target"
        ),
        "f:11: targets.a.fallback.load_threshold is a string; it must be a number",
        "f:14: targets.a.fallback.load_threshold is 2.0; it must be a load above 0, up to 1",
    ]


def test_a_fallback_to_an_unknown_target_is_reported_with_its_line(tmp_path: Path) -> None:
    text = f"[targets.'a.b']\nurl = '{URL}'\n[[targets.'a.b'.fallback]]\ntarget = 'c'\n"
    assert problems(text, tmp_path) == ["f:3: targets.\"a.b\".fallback is 'c'; it must be an existing target: a.b"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("'gpt-4o-mini'", "is a string; it must be a list of tables: [[targets.a.fallback]]"),
        ("{ model = 'm' }", "is a table; it must be a list of tables: [[targets.a.fallback]]"),
        ("['m']", "is a string; it must be a table"),
        ("[{ model = 5 }]", ".model is 5; it must be a string"),
    ],
)
def test_fallbacks_are_a_list_of_tables(given: str, problem: str, tmp_path: Path) -> None:
    (found,) = problems(f"[targets.a]\nurl = '{URL}'\nfallback = {given}\n", tmp_path)
    assert found in (f"f:3: targets.a.fallback {problem}", f"f:3: targets.a.fallback{problem}")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("listen = 8787", "gateway.listen is 8787; it must be a string"),
        ("listen = 'here'", "gateway.listen is 'here'; it must be HOST:PORT"),
        ("listen = '0.0.0.0:80'", "gateway.listen is '0.0.0.0:80'; it must be a loopback address"),
        ("token = 'hush'", "gateway.token is not a setting; did you mean token_env?"),
        ("targets = []", "gateway.targets is not a setting; known settings are listen, "),
        ("context = 'anyone'", "gateway.context is a string; it must be a table"),
        ("context.trust = 'everyone'", "gateway.context.trust is 'everyone'; it must be 'anyone', 'token' or 'nobody'"),
        ("context.trust = 'token'", "gateway.context.trust is 'token'; it must be 'anyone' or 'nobody' without"),
        ("context.tenant_headers = 'x'", "gateway.context.tenant_headers is a string; it must be a list of strings"),
        ("context.tenant_headers = [1]", "gateway.context.tenant_headers is a list; it must be a list of strings"),
        ("context.tenant_headers = ['a b']", "gateway.context.tenant_headers is 'a b'; it must be a list of header"),
    ],
)
def test_a_mistake_in_the_gateway_is_reported_with_its_line(line: str, problem: str, tmp_path: Path) -> None:
    (found,) = problems(f"[targets.openai]\nurl = '{URL}'\n[gateway]\n\n{line}\n", tmp_path)
    assert found.startswith(f"f:5: {problem}")
    assert "hush" not in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "f: there is no target: give --target NAME=URL, or a table [targets.NAME] with its url"),
        ("\n[targets]", "f:2: there is no target: give --target NAME=URL, or a table [targets.NAME] with its url"),
        ("targets = 3", "f:1: targets is 3; it must be a table"),
        ("[targets]\nopenai = 'x'", "f:2: targets.openai is a string; it must be a table"),
        ("[[targets]]\nname = 'x'", "f:1: targets is a list; it must be a table"),
        ("[target.openai]", "f:1: target is not a setting; did you mean targets?"),
        (f"gateway = 1\ntargets.a.url = '{URL}'", "f:1: gateway is 1; it must be a table"),
        ("a = ", "f:1: Invalid value (column 5)"),
    ],
)
def test_a_file_of_another_structure_is_rejected(text: str, problem: str, tmp_path: Path) -> None:
    assert problems(f"{text}\n", tmp_path) == [problem]


def test_a_mistake_that_involves_a_default_is_reported_at_its_table(tmp_path: Path) -> None:
    text = f"targets.a.url = '{URL}'\n[gateway]\ntoken_env = ''\n"
    assert problems(text, tmp_path) == [
        "f:3: gateway.token_env is ''; it must be the name of an environment variable or a file"
    ]
    assert problems("[targets.'A B']\nurl = 'https://a.example'\n", tmp_path)[0].startswith(
        "f:1: targets.\"A B\".name is 'A B'; it must be 1 to 63 lower-case letters"
    )


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    (found,) = problems("[targets.a]\nurl = 'https://me:hush@a.example'\n", tmp_path)
    assert "hush" not in found


# --- options ---


def test_options_alone_are_enough() -> None:
    settings = load_gateway_settings(
        None, targets=[OPENAI, ANTHROPIC], gateway={"listen": "[::1]:80", "token_env": None}
    )
    assert settings == GatewaySettings(
        listen="[::1]:80",
        targets=(
            TargetSettings(name="openai", url=URL),
            TargetSettings(name="anthropic", url="https://api.anthropic.com"),
        ),
    )


def test_a_limit_is_for_all_targets_and_one_with_a_name_for_that_target() -> None:
    limits = {"rpm": ["openai=50", "500"], "budget_usd": ["anthropic=2.5"]}
    openai, anthropic = load_gateway_settings(None, targets=[OPENAI, ANTHROPIC], limits=limits, share_keys=True).targets
    assert (openai.rpm, openai.budget_usd, openai.share_keys) == (50, None, True)
    assert (anthropic.rpm, anthropic.budget_usd, anthropic.share_keys) == (500, 2.5, True)


def test_every_limit_has_an_option_and_a_key(tmp_path: Path) -> None:
    limits = {"rpm": 1, "input_tpm": 2, "output_tpm": 3, "tpm": 4, "max_concurrent": 5, "budget_usd": 6.5}
    (openai,) = load_gateway_settings(
        None, targets=[OPENAI], limits={name: [str(value)] for name, value in limits.items()}
    ).targets
    assert openai == TargetSettings(name="openai", url=URL, **limits)  # type: ignore[arg-type]
    file = tmp_path / "forebay.toml"
    file.write_text(
        f"[targets.openai]\nurl = '{URL}'\n" + "\n".join(f"{name} = {value}" for name, value in limits.items())
    )
    assert load_gateway_settings(file).targets == (openai,)


def test_an_option_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(f"""
        gateway.listen = "127.0.0.1:1"
        gateway.body_timeout = 5
        [targets.openai]
        url = "{URL}"
        rpm = 5
        tpm = 7
        share_keys = true
    """)
    settings = load_gateway_settings(
        file,
        targets=["openai=http://127.0.0.1:9", ANTHROPIC],
        limits={"rpm": ["6"]},
        share_keys=False,
        gateway={"listen": "127.0.0.1:2"},
    )
    assert (settings.listen, settings.body_timeout) == ("127.0.0.1:2", 5)
    openai, anthropic = settings.targets
    assert openai == TargetSettings(name="openai", url="http://127.0.0.1:9", rpm=6, tpm=7)
    assert anthropic.rpm == 6


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "forebay gateway: there is no target"),
        ({"targets": [URL]}, "--target: it must be NAME=URL"),
        ({"targets": ["https://a.example/?b=c"]}, "--target: it must be NAME=URL"),
        ({"targets": ["=https://a.example"]}, "--target: it must be NAME=URL"),
        ({"targets": [OPENAI, OPENAI]}, "--target: 'openai' is given twice"),
        ({"targets": ["openai=ftp://a.example"]}, "--target: targets.openai.url is 'ftp://a.example'; it must be"),
        (
            {"targets": ["A B=https://a.example"]},
            "--target: targets.\"A B\".name is 'A B'; it must be 1 to 63 lower-case",
        ),
        ({"limits": {"rpm": ["5"]}}, "forebay gateway: there is no target"),
        ({"limits": {"rpm": ["opnai=5"]}}, "--rpm: there is no target 'opnai'; there are openai"),
        ({"limits": {"rpm": ["many"]}}, "--rpm: 'many' is not a whole number"),
        ({"limits": {"rpm": ["openai="]}}, "--rpm: 'openai=' is not a whole number"),
        ({"limits": {"input_tpm": ["1.5"]}}, "--input-tpm: '1.5' is not a whole number"),
        ({"limits": {"budget_usd": ["$5"]}}, "--budget-usd: '$5' is not a number"),
        ({"limits": {"budget_usd": ["nan"]}}, "--budget-usd: targets.openai.budget_usd is nan; it must be a positive"),
        ({"limits": {"rpm": ["0"]}}, "--rpm: targets.openai.rpm is 0; it must be a whole number of at least 1"),
        (
            {"gateway": {"listen": "0.0.0.0:1"}},
            "--listen: gateway.listen is '0.0.0.0:1'; it must be a loopback address",
        ),
        ({"gateway": {"token_env": "A", "token_file": "b"}}, "--token-file: gateway.token_file is 'b'; it must be"),
    ],
)
def test_a_mistake_in_an_option_is_reported_with_its_name(options: dict[str, Any], problem: str) -> None:
    bare = not options or options == {"limits": {"rpm": ["5"]}}
    assert problem_of(**({} if bare else {"targets": [OPENAI]}) | options).startswith(problem)


def test_an_option_below_a_key_that_is_not_a_table_reports_the_file(tmp_path: Path) -> None:
    assert problems("targets = 3\n", tmp_path, targets=[OPENAI]) == ["f:1: targets is 3; it must be a table"]
    assert problems("[targets]\nopenai = 3\n", tmp_path, limits={"rpm": ["5"]}) == [
        "f:2: targets.openai is 3; it must be a table"
    ]
