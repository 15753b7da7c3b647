"""Who may come in: the gate's ladder, the line, the deadline check, the seats promised to those sent away."""

from forebay.admission.feasibility import LetThrough, ServiceTimes
from forebay.admission.gate import Ladder
from forebay.admission.line import Line, Place
from forebay.admission.seats import BookedSeats

__all__ = ["BookedSeats", "Ladder", "LetThrough", "Line", "Place", "ServiceTimes"]
