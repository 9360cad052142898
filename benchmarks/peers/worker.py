"""A measured process: it reports itself, then times the calls that it is asked for, one at a time.

So processes of several environments take turns within one run. Nothing but the standard library is
imported here, as every peer's environment runs this.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any


class Worker:
    """The process's side: settings come as its argument, orders as lines, answers are lines of JSON."""

    def __init__(self):
        self.settings = json.loads(sys.argv[1])
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a package prints is no answer

    def answer(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self.answers, flush=True)

    def serve(
        self,
        calls: dict[str, Callable[[], Any]],
        compile_seconds: dict[str, float],
        packages: Sequence[str],
    ) -> None:
        """Report what there is, then answer each call's name with its seconds until the input ends.

        A call returns when its work is done. compile_seconds: of the calls that are compiled.
        """
        self.answer(
            {
                "calls": list(calls),
                "compile_seconds": compile_seconds,
                "versions": {name: version(name) for name in packages},
            }
        )
        for line in sys.stdin:
            began = time.perf_counter()
            calls[line.strip()]()
            self.answer({"seconds": time.perf_counter() - began})
