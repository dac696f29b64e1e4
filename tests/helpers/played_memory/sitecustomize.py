"""Run by each Python that starts with this folder on its PYTHONPATH: a rank whose memory is played.

The variable PLAYED_MEMORY names a JSON file, which is read at each use. "room": the bytes that a job can take of a
rank. "overflows": whether whole weights, or all weights ("all"), do not fit although they were predicted to.
"""

import json
import os
import sys
from pathlib import Path

if "ascend_runtime.engine.worker" in sys.orig_argv:
    from ascend_runtime.components import Components
    from ascend_runtime.engine.pipeline import RankPipeline
    from ascend_runtime.hardware import devices

    def played(what):
        return json.loads(Path(os.environ["PLAYED_MEMORY"]).read_text()).get(what)

    def overflows(message):
        parallel = getattr(message, "setting", message).parallel
        return played("overflows") == "all" or (played("overflows") == "whole" and not parallel.fsdp)

    def short(work):
        def tried(pipeline, job):
            if played("overflows") and overflows(job.message):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes.")
            return work(pipeline, job)

        return tried

    devices.room = lambda device: played("room")
    Components.makes_room = 0  # a part of "room"
    RankPipeline.sample, RankPipeline.velocity = short(RankPipeline.sample), short(RankPipeline.velocity)
