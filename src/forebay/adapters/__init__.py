"""Agents as they are, made into handlers: one file for each framework, imported when one of its agents is met."""

from forebay.adapters.handler import Handler, HandlesTasks
from forebay.adapters.recognise import FRAMEWORKS, Config, as_handler

__all__ = ["FRAMEWORKS", "Config", "Handler", "HandlesTasks", "as_handler"]
