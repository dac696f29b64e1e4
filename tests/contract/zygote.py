"""A process that has torch, torch_npu and the package imported, and forks itself for each piece of code that it runs.

Importing them takes seconds; a fork none. The SoC is asked for when the first card is taken, so that each fork may have
another. Standard input brings a line of JSON a piece (code, environment), standard output one back (code, out, err).
"""

import json
import os
import sys
import tempfile
import traceback


def run(code, environment, out, err):
    """In the fork: its standard streams become files, its environment changes."""
    os.environ.update(environment)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(file.fileno(), stream.fileno())
    status = 0
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    # Brings torch, and with it torch_npu; not diffusers, which counts the cards when it is imported.
    import ascend_runtime.components  # noqa: F401, PLC0415

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                run(asked["code"], asked["environment"], out, err)
            _, status = os.waitpid(child, 0)
            out.seek(0), err.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status), "out": out.read(), "err": err.read()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
