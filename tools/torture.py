"""Damaged and hostile files: every one has to be answered, and none may change a result without a word.

    python tools/torture.py --files [--count 2000] [--seed 0] [--only KIND ...] [--out tools/results/torture-files.json]

Makes one of every kind of file that is ever read, damages copies of it (bytes flipped, cut, repeated; values of JSON replaced;
a pipe, a folder or a loop of links in its place), and reads each in a process of its own with a limit of time and memory.
What came of it: `clean` (a CompressorError), `harmless` (read, and the result is that of the undamaged file), `changed`,
`raw` (any other exception), `hang`, `killed`. The last four must be 0.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
RESULTS = Path(__file__).parent / "results" / "torture-files.json"

from torture_files import KINDS, make  # noqa: E402 - beside this file, not installed

OUTCOMES = ("clean", "harmless", "changed", "raw", "hang", "killed")
LIMIT_S, LIMIT_BYTES = 60, 2 << 30
BAD = ("changed", "raw", "hang", "killed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="what there is to torture, so far")
    parser.add_argument("--count", type=int, default=2000, help="mutations over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="kinds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = torture(arguments.count, arguments.seed, arguments.only)
    arguments.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    sys.exit(1 if any(row[bad] for row in rows for bad in BAD) else 0)


def torture(count, seed, only=None):
    """One row per kind; prints the table, and every mutation that was not answered."""
    preload()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["COMPRESSOR_CACHE"] = str(home / "cache")
        forked(make, home / "good")
        kinds = [kind for kind in KINDS if not only or kind in only]
        rows, each = [], -(-count // len(kinds))
        print(f"seed {seed}, {each} mutations of each of {len(kinds)} kinds")
        print("kind".ljust(24), "tried", *(outcome.rjust(9) for outcome in OUTCOMES))
        for kind in kinds:
            found = of_kind(kind, home, each, random.Random(f"{seed} {kind}"))
            rows.append({"kind": kind, "seed": seed, "tried": each, **{name: found[name] for name in OUTCOMES}})
            print(kind.ljust(24), str(each).rjust(5), *(str(found[name]).rjust(9) for name in OUTCOMES), flush=True)
        return rows


def preload():
    """Import once what every process needs; nothing that starts a thread runs before the forks."""
    import torch

    torch.set_num_threads(1)
    for name in (
        "onnxruntime", "optuna", "PIL.Image", "compressor.pipeline.exporting", "compressor.search.study", "torch.onnx",
        "onnxscript", "torch._dynamo", "torch.export", "compressor.data.images",
    ):  # fmt: skip
        importlib.import_module(name)


def of_kind(kind, home, count, draw):
    names, read = KINDS[kind]
    expected = forked(read, home / "good")
    assert expected[0] == "read", f"{kind}: the undamaged files are not read: {expected}"
    found = Counter()
    for k in range(count):
        work = home / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(home / "good", work, symlinks=True)
        name = draw.choice([str(path.relative_to(work)) for pattern in names for path in sorted(work.glob(pattern))])
        said = damage(work / name, draw)
        outcome = forked(read, work)
        verdict = outcome[0] if outcome[0] != "read" else "harmless" if outcome == expected else "changed"
        found[verdict] += 1
        if verdict in BAD:
            print(f"  {kind} {k}: {name}, {said}: {verdict} {str(outcome[1])[:300]}", flush=True)
    return found


def forked(work, folder):
    """What `work(folder)` comes to in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(work, folder, theirs))
    process.start()
    theirs.close()
    limit = LIMIT_S if work is not make else 600
    outcome = ("hang", f"no answer within {limit} s")
    if ours.poll(limit):
        try:
            outcome = ours.recv()
        except EOFError:
            process.join()
            outcome = ("killed", f"exit code {process.exitcode}")
    process.kill()
    process.join()
    if work is make and outcome[0] != "read":
        raise SystemExit(f"the files could not be made: {outcome}")
    return outcome


def _in_process(work, folder, answer):
    from compressor.errors import CompressorError

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if work is not make:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    try:
        outcome = ("read", work(folder))
    except CompressorError as error:
        outcome = ("clean", str(error))
    except BaseException as error:
        outcome = ("raw", f"{type(error).__name__}: {error}")
    answer.send(outcome)
    os._exit(0)


def damage(path, draw):
    """Damage a file; what was done, in words."""
    choices = [_bytes, _bytes, _bytes, _place]
    if path.suffix in (".json", ".lock") or path.name == "config.pbtxt":
        choices = [_json, _json, _json, _bytes, _place]
    return draw.choice(choices)(path, draw)


def _bytes(path, draw):
    held = bytearray(path.read_bytes())
    size = max(len(held), 1)
    kind = draw.choice(("flip", "flip", "cut", "empty", "zero", "insert", "repeat", "remove", "text"))
    at, length = draw.randrange(size), draw.choice((1, 4, 64, 1000))
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 3, 30))):
            where = draw.choice((draw.randrange(size), draw.randrange(min(size, 4096))))
            if held:
                held[where] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del held[at:]
    elif kind == "empty":
        held.clear()
    elif kind == "zero":
        held[at : at + length] = bytes(len(held[at : at + length]))
    elif kind == "insert":
        held[at:at] = draw.randbytes(length)
    elif kind == "repeat":
        held[at:at] = held[at : at + length]
    elif kind == "remove":
        del held[at : at + length]
    else:
        held[at : at + 8] = draw.choice((b"99999999", b"-1", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"null", b'"'))
    path.write_bytes(bytes(held))
    return f"{kind} {length} at {at} of {size}"


def _json(path, draw):
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return _bytes(path, draw)
    places = list(_places(value))
    if not places:
        return _bytes(path, draw)
    holder, key = draw.choice(places)
    kind = draw.choice(("replace", "replace", "replace", "remove", "rename", "deep", "digits"))
    if kind == "remove":
        holder.pop(key)
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = "@@" if kind in ("deep", "digits") else draw.choice(ODD)
    text = json.dumps(value)
    text = text.replace('"@@"', "[" * 200_000 + "]" * 200_000 if kind == "deep" else "9" * 5000)
    path.write_text(text)
    return f"{kind} {key!r}"


ODD = (
    None, True, False, -1, 0, 1, 3, 10**15, 2**62, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "\0", "é" * 5000, [], [[]], [-1], [1e999], {}, {"a": {}}, ["x", None], "facts/../../../x.json", "float99",
)  # fmt: skip


def _places(value):
    """Every place of a JSON value that something else can be put into."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _place(path, draw):
    kind = draw.choice(("missing", "pipe", "folder", "loop", "link out", "unreadable"))
    if kind == "unreadable":
        path.chmod(0)
        return kind
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link out":
        path.symlink_to("/etc/passwd")
    return kind


if __name__ == "__main__":
    begun = time.monotonic()
    try:
        main()
    finally:
        print(f"{time.monotonic() - begun:.0f} s")
