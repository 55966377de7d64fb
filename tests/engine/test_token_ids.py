"""No token that the model has no row for reaches an executor, whichever way it comes."""

import pytest

from model_store.pair import open_pair
from server.core.request import Request, SamplingParams
from server.core.size_policy import RequestRefused
from tests.model.test_oracle import make_engine
from tests.tiny_pairs import VOCAB, make_pair

WAYS = {
    "prompt": ([3, VOCAB], {}),
    "prompt, negative": ([3, -1], {}),
    "allowed_token_ids": ([3], {"allowed_token_ids": (1, VOCAB)}),
    "logit_bias": ([3], {"logit_bias": {VOCAB + 5: 1.0}}),
    "bad_words": ([3], {"bad_words_ids": ((1, 2), (VOCAB,))}),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return make_engine(open_pair(*make_pair(tmp_path_factory.mktemp("pair"))), "torch")


@pytest.mark.parametrize("way", WAYS)
def test_tokens_beyond_the_rows_are_refused(way, engine):
    prompt, sampling = WAYS[way]
    with pytest.raises(RequestRefused, match="is not in the model's vocabulary") as refusal:
        engine.add_request(
            Request(request_id="a", prompt_token_ids=prompt, sampling=SamplingParams(**sampling), sizes=(6,))
        )
    assert refusal.value.refusal.param == way.split(",")[0] and not engine.has_work


def test_the_last_token_is_served(engine):
    engine.add_request(
        Request(request_id="b", prompt_token_ids=[VOCAB - 1], sampling=SamplingParams(max_tokens=1), sizes=(6,))
    )
    while engine.has_work:
        assert not any(output.error for output in engine.step())
