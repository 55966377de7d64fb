"""llama.cpp's HTTP server: `server_llamacpp.py MODEL.gguf SLOTS CONTEXT THREADS [q8_0]`, its KV; prints its address."""

import signal
import sys

import xllamacpp

model, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_parallel, params.n_ctx = slots, slots * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_prompt, params.cache_ram_mib = False, 0
if sys.argv[5:] == ["q8_0"]:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED  # what it needs for V
params.port = 0
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
signal.pause()
