"""A simulated LLM provider."""
