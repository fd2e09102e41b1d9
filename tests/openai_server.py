"""transformers' own server of an OpenAI-compatible API, as a process: `python openai_server.py PORT`.

One thing of it is switched off (4.57.6): a request that goes on with the messages of the last one takes over
its cache, although that one may still run (then the answer is an error), and although the cache holds its
answer, which need not be what the new request says.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers.commands.serving import ServeArguments, ServeCommand


class Server(ServeCommand):  # type: ignore[misc, unused-ignore]
    def is_continuation(self, req: dict[str, Any]) -> bool:
        return False


if __name__ == "__main__":
    arguments = ServeArguments(host="127.0.0.1", port=int(sys.argv[1]), device="cpu", log_level="warning")
    Server(arguments).run()  # type: ignore[no-untyped-call, unused-ignore]
