"""The dummy's worker: one file, standard library only, run in the toolchain's environment. Misbehaves when asked."""

import json
import os
import subprocess
import sys
import time


def work(request):
    import flatbuffers  # of the environment, not of the caller's

    how = request.get("how", "well")
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(600)
    if how == "exit":
        os._exit(0)
    if how == "error":
        return {
            "error": {"type": "UnsupportedError", "what": "no such operator", "where": "node n", "fix": "export anew"}
        }
    if how == "compile":
        with open(request["model"], "rb") as source, open(request["artifact"], "wb") as artifact:
            artifact.write(b"DUMMY\0" + source.read())
        return {"result": {"level": request.get("level", 1)}}
    if how == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return {"result": {"child": child.pid}}
    facts = {
        "greeting": os.environ["DUMMY_GREETING"],
        "isolated": sys.flags.isolated,
        "version": flatbuffers.__version__,
    }
    return {"result": {**facts, "modelforge": "modelforge" in sys.modules, "path": sys.path}}


def main(request_file, answer_file):
    with open(request_file, encoding="utf-8") as stream:
        request = json.load(stream)
    print("a vendor prints to stdout")  # noqa: T201 - as vendors do
    answer = json.dumps(work(request))
    answer = {"half": answer[: len(answer) // 2], "garbage": "\0\1garbage", "wrong": '{"result": 3}'}.get(
        request.get("how"), answer
    )
    with open(answer_file, "w", encoding="utf-8") as stream:
        stream.write(answer)


main(*sys.argv[1:])
