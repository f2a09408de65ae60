"""Where the seconds of a step went, sampled from a side thread: kept also of a step that is stopped."""

import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
EVERY_S = 0.02
MOST = 25  # lines that are kept


def watch(say, every_s=2.0):
    """Sample the calling thread; `say` gets [[seconds, "file:line function"], …], every line with what it called."""
    watched, found = threading.get_ident(), Counter()

    def sample():
        begun = said = last = time.monotonic()
        while True:
            time.sleep(EVERY_S)
            now = time.monotonic()
            for line in set(own_lines(sys._current_frames().get(watched))):
                found[line] += now - last
            last = now
            if now - said >= every_s or (now - begun < every_s and now - said >= 0.5):
                said = now
                say([[round(seconds, 1), line] for line, seconds in found.most_common(MOST)])

    threading.Thread(target=sample, daemon=True).start()


def own_lines(frame):
    """Lines of this repository on a stack, the innermost first."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT) and "site-packages" not in code.co_filename:
            yield f"{code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
