"""Who may come in: the gate's ladder, the line, the deadline check, the seats promised to those sent away."""

from forebay.admission.feasibility import LetThrough, ServiceTimes
from forebay.admission.gate import Ladder
from forebay.admission.line import LAST, Line, Place
from forebay.admission.seats import BookedSeats

__all__ = ["LAST", "BookedSeats", "Ladder", "LetThrough", "Line", "Place", "ServiceTimes"]
