"""A peer's process, from the inside: `python -m layerskip.bench.baselines MODULE`.

The first line of standard input is a `Job`, each further one asks for an answer; one line of JSON goes
out for each. What libraries print goes to standard error.
"""

import dataclasses
import importlib
import json
import os
import sys
import warnings
from typing import Any, TextIO

from layerskip.bench.baselines.process import Job
from layerskip.bench.measure import Setting


def main(module: str, requests: TextIO, replies: TextIO) -> None:
    """Serve until the input ends."""
    peer: Any = None
    settings: list[Setting] = []
    for line in requests:
        request = json.loads(line)
        try:
            if peer is None:
                job = Job.from_dict(request)
                settings = list(job.settings)
                peer = importlib.import_module(module).Peer(job)
                reply: dict[str, Any] = {"build": getattr(peer, "build", None)}
            else:
                setting = settings[request["setting"]]
                run = peer.answer(setting, request["prompt"], request["max_new_tokens"])
                reply = dataclasses.asdict(run)
        except Exception as error:  # whatever the library raises is the reason that the row shows
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if peer is None:
            return


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # Keep the real standard output for replies alone; C++ libraries write to file descriptor 1 too.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(sys.argv[1], sys.stdin, channel)
