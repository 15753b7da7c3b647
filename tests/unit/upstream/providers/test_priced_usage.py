"""The cost of an answer, from its bytes, is what the price list says, for each kind of usage that providers report."""

from __future__ import annotations

import json
from typing import Any, Final

import genai_prices
import pytest

from forebay.quota import Prices
from forebay.upstream.providers import read_response

OPENAI_CHAT: Final = {
    "prompt_tokens": 2_006,
    "completion_tokens": 300,
    "total_tokens": 2_306,
    "prompt_tokens_details": {"cached_tokens": 1_920, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 192,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}
OPENAI_RESPONSE: Final = {
    "input_tokens": 328,
    "input_tokens_details": {"cached_tokens": 128},
    "output_tokens": 452,
    "output_tokens_details": {"reasoning_tokens": 384},
    "total_tokens": 780,
}
LONG_RESPONSE: Final = {
    "input_tokens": 300_000,
    "input_tokens_details": {"cached_tokens": 100_000},
    "output_tokens": 5_000,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 305_000,
}
AUDIO_CHAT: Final = {
    "prompt_tokens": 120,
    "completion_tokens": 260,
    "total_tokens": 380,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 100},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 200},
}
IMAGE: Final = {
    "input_tokens": 150,
    "input_tokens_details": {"image_tokens": 100, "text_tokens": 50},
    "output_tokens": 4_160,
    "total_tokens": 4_310,
}
ANTHROPIC: Final = {
    "input_tokens": 21,
    "cache_creation_input_tokens": 5_000,
    "cache_read_input_tokens": 188_086,
    "cache_creation": {"ephemeral_5m_input_tokens": 3_000, "ephemeral_1h_input_tokens": 2_000},
    "output_tokens": 393,
    "service_tier": "standard",
}
CLAUDE_UNITS: Final = {
    "input_tokens": 21 + 5_000 + 188_086,
    "cache_read_tokens": 188_086,
    "cache_write_tokens": 5_000,
    "cache_write_1h_tokens": 2_000,
    "output_tokens": 393,
}
SEARCHES: Final = {
    "input_tokens": 10_682,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 487,
    "server_tool_use": {"web_search_requests": 3},
}
LONG_CLAUDE: Final = {
    "input_tokens": 50_000,
    "cache_creation_input_tokens": 20_000,
    "cache_read_input_tokens": 180_000,
    "output_tokens": 1_000,
}
BATCHED_CLAUDE: Final = {**ANTHROPIC, "service_tier": "batch"}
SEARCH_ITEMS: Final = [{"type": "web_search_call", "id": "ws_1"}, {"type": "message"}, {"type": "web_search_call"}]
CHAT_UNITS: Final = {"input_tokens": 2_006, "cache_read_tokens": 1_920, "output_tokens": 300}
RESPONSE_UNITS: Final = {"input_tokens": 328, "cache_read_tokens": 128, "output_tokens": 452}
LONG_UNITS: Final = {"input_tokens": 300_000, "cache_read_tokens": 100_000, "output_tokens": 5_000}

CASES: Final[dict[str, tuple[str, str, dict[str, Any], dict[str, int], dict[str, str]]]] = {
    "cached input": ("openai", "gpt-4o", {"usage": OPENAI_CHAT}, CHAT_UNITS, {}),
    "reasoning in a chat": ("openai", "o4-mini", {"usage": OPENAI_CHAT}, CHAT_UNITS, {}),
    "azure": ("azure", "gpt-4o", {"usage": OPENAI_CHAT}, CHAT_UNITS, {}),
    "reasoning in a response": ("openai", "gpt-5", {"usage": OPENAI_RESPONSE}, RESPONSE_UNITS, {}),
    "the default tier": (
        *("openai", "gpt-5", {"usage": OPENAI_RESPONSE, "service_tier": "default"}, RESPONSE_UNITS),
        {"service_tier": "default"},
    ),
    "flex": (
        *("openai", "gpt-5", {"usage": OPENAI_RESPONSE, "service_tier": "flex"}, RESPONSE_UNITS),
        {"service_tier": "flex"},
    ),
    "priority": (
        *("openai", "gpt-5", {"usage": OPENAI_CHAT, "service_tier": "priority"}, CHAT_UNITS),
        {"service_tier": "priority"},
    ),
    "a long context": ("openai", "gpt-5.4", {"usage": LONG_RESPONSE}, LONG_UNITS, {}),
    "a long context with priority": (
        *("openai", "gpt-5.4", {"usage": LONG_RESPONSE, "service_tier": "priority"}, LONG_UNITS),
        {"service_tier": "priority"},
    ),
    "sound": (
        *("openai", "gpt-audio", {"usage": AUDIO_CHAT}),
        {"input_tokens": 120, "input_audio_tokens": 100, "output_tokens": 260, "output_audio_tokens": 200},
        {},
    ),
    "an image": (
        *("openai", "gpt-image-1", {"usage": IMAGE}),
        {"input_tokens": 150, "input_image_tokens": 100, "output_tokens": 4_160},
        {},
    ),
    "embeddings": (
        *("openai", "text-embedding-3-small", {"usage": {"prompt_tokens": 812, "total_tokens": 812}}),
        {"input_tokens": 812, "output_tokens": 0},
        {},
    ),
    "web searches of a response": (
        *("openai", "gpt-5", {"usage": OPENAI_RESPONSE, "output": SEARCH_ITEMS}),
        {**RESPONSE_UNITS, "web_searches": 2},
        {},
    ),
    "both caches of Anthropic": ("anthropic", "claude-opus-4-1", {"usage": ANTHROPIC}, CLAUDE_UNITS, {}),
    "web searches of Anthropic": (
        *("anthropic", "claude-sonnet-4-5", {"usage": SEARCHES}),
        {"input_tokens": 10_682, "output_tokens": 487, "web_searches": 3},
        {},
    ),
    "a long context of Anthropic": (
        *("anthropic", "claude-sonnet-4-5", {"usage": LONG_CLAUDE}),
        {"input_tokens": 250_000, "cache_write_tokens": 20_000, "cache_read_tokens": 180_000, "output_tokens": 1_000},
        {},
    ),
    "fast Anthropic": (
        *("anthropic", "claude-opus-5", {"usage": {**ANTHROPIC, "speed": "fast"}}, CLAUDE_UNITS),
        {"speed": "fast"},
    ),
    "a batch of Anthropic": (
        *("anthropic", "claude-opus-4-6", {"usage": BATCHED_CLAUDE}, CLAUDE_UNITS),
        {"processing": "batch"},
    ),
    "a batch of OpenAI": (
        *("openai", "gpt-5", {"usage": OPENAI_RESPONSE, "service_tier": "batch"}, RESPONSE_UNITS),
        {"processing": "batch"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_costs_what_the_price_list_says(case: str) -> None:
    provider, model, answer, units, context = CASES[case]
    usage = read_response(json.dumps(answer).encode()).usage
    assert usage is not None
    listed = genai_prices.calc_price(
        genai_prices.Usage(**units), model, provider_id=provider, price_context=context or None
    )
    assert Prices().cost(provider, model, usage.billed()) == pytest.approx(float(listed.total_price))


@pytest.mark.parametrize(
    ("usage", "output", "reasoning"),
    [
        (OPENAI_CHAT, 300, 192),
        (OPENAI_RESPONSE, 452, 384),
        # Gemini's and xAI's chat completions count hidden reasoning in the total alone.
        ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 130}, 120, 100),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 20,
                "total_tokens": 130,
                "completion_tokens_details": {"reasoning_tokens": 100},
            },
            *(120, 100),
        ),
        (ANTHROPIC, 393, 0),
        ({"prompt_tokens": 1, "completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 9}}, 2, 2),
    ],
)
def test_hidden_reasoning_is_part_of_the_output(usage: dict[str, Any], output: int, reasoning: int) -> None:
    read = read_response(json.dumps({"usage": usage}).encode()).usage
    assert read is not None
    assert (read.output_tokens, read.reasoning_tokens) == (output, reasoning)
