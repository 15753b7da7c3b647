"""Agents on one key: their plans, the plants that they meet, an oracle's schedule, and the ways there."""
