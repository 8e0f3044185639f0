"""Logs on stderr: warnings alone unless asked for more, as text or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`, and `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up_logs(as_json: bool, access_log: bool) -> None:
    """Sends the logs of server and HTTP library to stderr. Call it once, in the server's process."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    for name, level in (
        ("llmc", logging.WARNING),
        ("uvicorn", logging.WARNING),
        ("uvicorn.access", logging.INFO if access_log else logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if name != "uvicorn.access":
            logger.handlers = [handler]
            logger.propagate = False
