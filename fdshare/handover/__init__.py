"""Restart a server without losing a connection: the sockets go from the old process to the new one, by descriptor.

The table of the protocol, and of what each crash does, is in ``protocol.py``; of the old side's states in ``door.py``, of the new
side's in ``succession.py``, of who may accept in ``gate.py``.
"""

from fdshare.handover.adoption import Connections
from fdshare.handover.errors import HandoverBusyError, HandoverError, HandoverRevokedError, RetiredError
from fdshare.handover.gate import Retired
from fdshare.handover.gated import HandoverSocket
from fdshare.handover.handover import Handover
from fdshare.handover.systemd import notify

__all__ = [
    "Connections",
    "Handover",
    "HandoverBusyError",
    "HandoverError",
    "HandoverRevokedError",
    "HandoverSocket",
    "Retired",
    "RetiredError",
    "notify",
]
