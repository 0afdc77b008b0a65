"""From data to micro-batches: the windows of a loader, and micro-batches of about equal cost."""

from gradacc._order import Reordered
from gradacc.data._token_budget import token_budget
from gradacc.data._windows import Steps, Windows, windows

__all__ = ["Reordered", "Steps", "Windows", "token_budget", "windows"]
