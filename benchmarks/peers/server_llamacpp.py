"""llama.cpp's own HTTP server: `server_llamacpp.py MODEL.gguf SLOTS CONTEXT THREADS`; prints its address."""

import signal
import sys

import xllamacpp

model, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_parallel, params.n_ctx = slots, slots * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_prompt, params.cache_ram_mib = False, 0
params.port = 0
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
signal.pause()
