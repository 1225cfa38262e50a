"""The program that a `RewardPool` worker is: reads answers from a pipe, says what math-verify or a named reward thinks.

Run as `python -m aster.agent.verifier FD`. An answer that cannot be read as mathematics is wrong; a ground truth that
cannot be read, or an error, is reported as an error. The process ends with its parent, and by itself when one answer
burns more CPU than the parent would ever wait for.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from multiprocessing.connection import Connection

_MEMORY_BYTES = 4 << 30  # 9**9**9 must end here and not in the machine's swap


def serve(pipe: Connection) -> None:
    from aster.agent.rewards import judge, math_verify_verdict

    math_verify_verdict("\\boxed{1}", "1")  # pays for the imports and the parser tables
    pipe.send_bytes(json.dumps({"ready": True}).encode())
    while True:
        try:
            reward, final_text, ground_truth, timeout_s = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        # SIGVTALRM ends the process also where a computation holds the interpreter and nobody is left to kill it
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * timeout_s)
        try:
            answer: dict[str, object] = {"value": judge(reward, final_text, ground_truth)}
        except Exception as error:  # policy: reported, counted and logged by the pool
            answer = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        pipe.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # a warning per answer without a box
    serve(Connection(int(sys.argv[1])))
