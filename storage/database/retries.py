"""Retries of what the database lost: a dropped connection, a server that restarts, a deadlock, a locked file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from alphasmith.objectives.errors import AlphasmithError

T = TypeVar("T")

#: Seconds for which a lost operation is repeated: longer than a server takes to restart.
PATIENCE = 120.0

_LONGEST_WAIT = 5.0
_OPTUNAS = "optuna.exceptions.StorageInternalError"

# Connection exceptions (class 08), shutting down or starting up (57P0x), too many connections, serialization failure,
# deadlock, lock not available, asleep inside a transaction for too long.
_POSTGRESQL = ("08", "57P01", "57P02", "57P03", "57P05", "53300", "40001", "40P01", "55P03", "25P03")
# psycopg gives no code where connecting failed; waiting does not mend these.
_HOPELESS = ("authentication failed", "does not exist", "no pg_hba.conf entry", "not permitted to log in")
# Too many connections, shutting down, network errors, lock wait timeout, deadlock, killed, no server, gone away, lost.
_MYSQL = frozenset({1020, 1040, 1053, 1158, 1159, 1160, 1161, 1205, 1213, 1927, 2002, 2003, 2006, 2013, 2055})
# SQLITE_BUSY and SQLITE_LOCKED; the upper bits of a code only say more about it.
_SQLITE = frozenset({5, 6})


def is_lost(error: BaseException) -> bool:
    """Whether an error of the database may vanish when the whole transaction is repeated.

    Args:
        error: SQLAlchemy's error, or ours or Optuna's with that as its cause.
    """
    if not isinstance(error, SQLAlchemyError):
        cause = error.__cause__
        ours = isinstance(error, AlphasmithError) or _is_optunas(error)
        return ours and cause is not None and is_lost(cause)
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError) or error.orig is None:
        return False
    return error.connection_invalidated or _driver_says_lost(error, error.orig)


def _is_optunas(error: BaseException) -> bool:
    """Whether Optuna's storage says so; without importing Optuna, which an error of its has imported."""
    return any(f"{kind.__module__}.{kind.__name__}" == _OPTUNAS for kind in type(error).__mro__)


def _driver_says_lost(error: DBAPIError, cause: BaseException) -> bool:
    sqlite = getattr(cause, "sqlite_errorcode", None)
    if sqlite is not None:
        return sqlite & 0xFF in _SQLITE
    state = getattr(cause, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_POSTGRESQL)
    if type(cause).__module__.partition(".")[0] == "psycopg":
        return isinstance(error, OperationalError) and not any(text in str(cause) for text in _HOPELESS)
    return bool(cause.args) and cause.args[0] in _MYSQL


def retry_lost(
    operation: Callable[[], T],
    *,
    patience: float = PATIENCE,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Call ``operation`` again while it fails for a reason that may pass; what it does must be safe to do twice.

    A commit whose answer was lost may have happened. For our own tables, ``Database.transact`` does this; here it is for
    calls into Optuna's storage.

    Args:
        operation: The whole of it, from its beginning.
        patience: Seconds after which it is not begun again.
        sleep: Waits for so many seconds.
        clock: Seconds on a clock that never jumps.

    Returns:
        What the operation returns.

    Raises:
        Exception: The operation's own last error.
    """
    began = clock()

    def over(state: RetryCallState) -> bool:
        return clock() - began + state.upcoming_sleep > patience

    # Jitter: all the workers of a cluster lose the same server at the same moment.
    retrying = Retrying(
        stop=over,
        wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_WAIT),
        retry=retry_if_exception(is_lost),
        sleep=sleep,
        reraise=True,
    )
    return retrying(operation)
