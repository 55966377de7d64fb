"""`python -m tests.faults.faulty serve ...`: the real server, whose executor fails when a test tells it to.

The test writes JSON into the file named by FAULTS; it is read at every step:
  {"fail": 2}            the next two steps raise, then all is well
  {"poison": 77}         every step with token 77 in it raises
  {"nan": 77}            rows of requests whose step holds token 77 come out as NaN
  {"memory": 8}          a step of more than 8 tokens runs out of memory
  {"broken": true}       every step raises
  {"kill": true}         the engine thread ends, as if by a bug outside any step
  {"sleep": 0.05}        every step takes that much longer
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from server.engine import runner
from server.model.torch_executor import TorchExecutor

_faults = Path(os.environ["FAULTS"])


class FaultyExecutor(TorchExecutor):
    _failed = 0

    def forward(self, batch):
        faults = json.loads(_faults.read_text() or "{}")
        time.sleep(faults.get("sleep", 0))
        if faults.get("kill"):
            raise SystemExit("killed by a test")
        if faults.get("broken") or self._failed < faults.get("fail", 0):
            self._failed += 1
            raise RuntimeError("injected fault")
        if faults.get("poison") in batch.input_ids:
            raise RuntimeError("injected poison")
        if batch.num_tokens > faults.get("memory", 1 << 30):
            raise torch.OutOfMemoryError("injected: out of memory")
        hidden = super().forward(batch)
        for request in range(batch.num_requests):
            if faults.get("nan") in batch.input_ids[batch.query_start[request] : batch.query_start[request + 1]]:
                hidden[batch.logits_start[request] : batch.logits_start[request + 1]] = torch.nan
        return hidden


runner.create_executor = lambda pair, config: FaultyExecutor(pair, page_size=config.page_size)

if __name__ == "__main__":
    from server.cli import main

    sys.exit(main())
