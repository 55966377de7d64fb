"""The real default pair against transformers: logits and greedy text in float32, at three sizes, in one mixed batch."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_store.pair import LoadedPair, open_pair
from model_store.store import StoreError
from model_store.weight_form import WeightForm
from server.core.config import EngineConfig
from server.core.request import Request, SamplingParams
from server.engine.engine import Engine

PROMPTS = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47], [504, 3575, 282, 4649, 314], list(range(900, 960))]


@pytest.fixture(scope="module")
def pair():
    try:
        return open_pair()
    except StoreError as error:
        pytest.skip(f"the default teacher cannot be had here: {error}")


@pytest.fixture(scope="module")
def loaded(pair) -> LoadedPair:
    return pair.load(WeightForm(torch.float32)).in_torch()


def assemble(teacher, loaded: LoadedPair, size: int):
    """The intermediate model as a transformers module, with the teacher's own parameters wherever they are those; the
    student shares embedding, norm and head with the teacher."""
    own = {id(parameter): parameter for parameter in teacher.parameters()}
    model = copy.deepcopy(teacher, dict(own))
    num_teacher, spec, layers = loaded.elasticity.num_teacher_layers, loaded.spec, []
    for position, layer_id in enumerate(loaded.elasticity.path(size).layers):
        kept = layer_id if layer_id < num_teacher else loaded.elasticity.kept[layer_id - num_teacher]
        layer = copy.deepcopy(teacher.model.layers[kept], {} if layer_id >= num_teacher else dict(own))
        layer.self_attn.layer_idx = position
        if layer_id >= num_teacher:
            weights = loaded.layers[layer_id]
            q, k, v = weights.qkv_weight.split((spec.q_size, spec.kv_size, spec.kv_size))
            gate, up = weights.up_weight.chunk(2)
            state = {
                "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v,
                "self_attn.o_proj.weight": weights.o_weight, "mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up,
                "mlp.down_proj.weight": weights.down_weight, "input_layernorm.weight": weights.attn_norm_weight,
                "post_attention_layernorm.weight": weights.mlp_norm_weight,
            }  # fmt: skip
            layer.load_state_dict(state)
        layers.append(layer)
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


@pytest.fixture(scope="module")
def expected(pair, loaded):
    """A function from size and text to transformers' log-probabilities [tokens, vocabulary], computed once."""
    teacher = AutoModelForCausalLM.from_pretrained(pair.teacher_path, dtype=torch.float32).eval()
    model = functools.cache(lambda size: assemble(teacher, loaded, size))

    @functools.cache
    @torch.no_grad()
    def logprobs(size: int, text: tuple[int, ...]) -> torch.Tensor:
        return torch.log_softmax(model(size)(torch.tensor([text]), use_cache=False).logits[0], -1)

    return logprobs


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_sizes_of_the_default_pair_match_transformers(pair, expected, executor):
    config = EngineConfig(executor=executor, max_model_len=128, max_num_batched_tokens=32, kv_cache_bytes=64 << 20)
    try:
        engine = Engine(
            pair.load(WeightForm(torch.float32)), config
        )  # of its own: an executor may pack what it is given
    except ValueError as error:
        pytest.skip(str(error))
    sizes = (16, 23, 30)
    requests = [
        Request(
            f"{size}-{i}",
            list(prompt),
            SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=5, prompt_logprobs=0),
            sizes=(size,),
        )
        for size in sizes
        for i, prompt in enumerate(PROMPTS)
    ]
    outputs = {request.request_id: [] for request in requests}
    requests = [engine.add_request(request) for request in requests]
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    for size in sizes:
        for request in (r for r in requests if r.sizes == (size,)):
            text = request.prompt_token_ids + request.output_token_ids
            logprobs = expected(size, tuple(text))
            start = request.num_prompt_tokens
            assert logprobs[start - 1 : -1].argmax(-1).tolist() == request.output_token_ids
            prompt = next(o.prompt_logprobs for o in outputs[request.request_id] if o.prompt_logprobs)
            scores = prompt[1:] + [s for o in outputs[request.request_id] for s in o.new_logprobs or []]
            for position, score in enumerate(scores):
                for token, value in ((score.token_id, score.logprob), *score.top):
                    assert value == pytest.approx(logprobs[position, token].item(), rel=1e-4, abs=1e-4)
