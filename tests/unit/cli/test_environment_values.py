"""Values of a gateway's file that come from environment variables."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from forebay.cli.config import load_gateway_settings
from forebay.cli.toml_document import InvalidConfiguration
from forebay.gateway import GatewaySettings

SECRET = "hunter2"


def load(text: str, tmp_path: Path, **environment: str) -> GatewaySettings:
    file = tmp_path / "forebay.toml"
    file.write_text(textwrap.dedent(text))
    return load_gateway_settings(file, environment=environment)


def problems(text: str, tmp_path: Path, **environment: str) -> list[str]:
    """Return the problems of a file, with ``f`` for its name."""
    with pytest.raises(InvalidConfiguration) as rejected:
        load(text, tmp_path, **environment)
    return str(rejected.value).replace(str(tmp_path / "forebay.toml"), "f").splitlines()


def test_variables_are_replaced_wherever_a_string_is(tmp_path: Path) -> None:
    settings = load(
        """
        [gateway.context]
        tenant_headers = ["x-${WHO}-id"]
        [targets.openai]
        url = "https://${HOST}:${PORT}/${PATH_}"
        [[targets.openai.fallback]]
        model = "${MODEL}"
        """,
        tmp_path,
        WHO="user",
        HOST="h.example",
        PORT="1",
        PATH_="p",
        MODEL="m",
    )
    (target,) = settings.targets
    assert target.url == "https://h.example:1/p"
    assert target.fallback[0].model == "m"
    assert settings.context.tenant_headers == ("x-user-id",)


def test_numbers_and_booleans_are_converted(tmp_path: Path) -> None:
    settings = load(
        """
        [targets.openai]
        url = "https://h.example"
        rpm = "${RPM}"
        budget_usd = "${USD:-2.5}"
        share_keys = "${SHARE}"
        """,
        tmp_path,
        RPM="500",
        SHARE="true",
    )
    (target,) = settings.targets
    assert (target.rpm, target.budget_usd, target.share_keys) == (500, 2.5, True)


def test_a_default_stands_for_what_is_not_set_or_empty(tmp_path: Path) -> None:
    text = """
        [targets.openai]
        url = "https://${HOST:-h.example}"
        """
    assert load(text, tmp_path).targets[0].url == "https://h.example"
    assert load(text, tmp_path, HOST="").targets[0].url == "https://h.example"
    assert load(text, tmp_path, HOST="other").targets[0].url == "https://other"


def test_two_dollars_are_one_and_a_lone_one_stays(tmp_path: Path) -> None:
    text = """
        [targets.openai]
        url = "https://h.example/$$/$${HOST}/$5"
        """
    assert load(text, tmp_path, HOST="x").targets[0].url == "https://h.example/$/${HOST}/$5"


def test_a_value_is_not_replaced_again(tmp_path: Path) -> None:
    text = """
        [targets.openai]
        url = "https://${HOST}"
        """
    assert load(text, tmp_path, HOST="h.example/${OTHER}", OTHER="x").targets[0].url == "https://h.example/${OTHER}"


def test_a_variable_that_is_not_set_is_a_mistake_with_its_line(tmp_path: Path) -> None:
    text = """
        [targets.openai]
        url = "https://${HOST}"
        rpm = "${RPM}"
        """
    assert problems(text, tmp_path) == [
        f"f:{line}: targets.openai.{key} needs the environment variable {name}, which is not set; set it, or write"
        f" ${{{name}:-default}}"
        for line, key, name in ((3, "url", "HOST"), (4, "rpm", "RPM"))
    ]


@pytest.mark.parametrize("bad", ["${}", "${A B}", "${1A}", "${A", "${A:-${B}}", "${A:default}"])
def test_what_is_no_reference_is_a_mistake(tmp_path: Path, bad: str) -> None:
    (problem,) = problems(f'[targets.openai]\nurl = "https://{bad}"\n', tmp_path, A="a", B="b")
    assert problem == (
        "f:2: targets.openai.url has a '${' that begins neither ${NAME} nor ${NAME:-default};"
        " write $$ for a dollar sign"
    )


@pytest.mark.parametrize(
    "line",
    [
        'url = "${V}"',
        'url = "https://h.example"\nprovider = "${V}"',
        'url = "https://h.example"\nrpm = "${V}"',
        'url = "https://h.example"\nshare_keys = "${V}"',
        'url = "https://h.example"\nunmetered = "${V}"',
        'url = "https://h.example"\nweights = {a = "${V}"}',
        'url = "https://h.example"\nprices = {m = {input = "${V}", output = 1}}',
        'url = "https://h.example"\nfallback = [{model = "m", load_threshold = "${V}"}]',
        'url = "https://h.example"\nfallback = [{target = "${V}"}]',
    ],
)
def test_no_mistake_shows_the_value_of_a_variable(tmp_path: Path, line: str) -> None:
    shown = "\n".join(problems(f"[targets.openai]\n{line}\n", tmp_path, V=SECRET))
    assert "$V" in shown
    assert SECRET not in shown


def test_an_option_replaces_a_value_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text('[gateway]\nlisten = "${LISTEN}"\n[targets.openai]\nurl = "https://h.example"\n')
    environment = {"LISTEN": "127.0.0.1:1"}
    assert load_gateway_settings(file, environment=environment).listen == "127.0.0.1:1"
    given = load_gateway_settings(file, environment=environment, gateway={"listen": "127.0.0.1:2"})
    assert given.listen == "127.0.0.1:2"


@pytest.mark.parametrize(
    "lines",
    [
        ["[gateway]", 'token_env = "${KEY}"', "[targets.openai]", 'url = "https://h.example"'],
        ["[targets.openai]", 'url = "https://h.example"', 'api_key_env = "${KEY}"'],
        ["[targets.openai]", 'url = "https://h.example"', 'keys = [{ api_key_env = "${KEY}" }]'],
    ],
)
def test_the_value_of_a_variable_is_not_taken_for_the_name_of_one(tmp_path: Path, lines: list[str]) -> None:
    (problem,) = problems("\n".join(lines), tmp_path, KEY=SECRET)
    says = "_env takes the name of an environment variable, not its value: write the name alone, without ${}"
    assert problem.endswith(says)
    assert SECRET not in problem
