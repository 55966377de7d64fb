"""The teacher's own questions: sampled from the start of a user's turn, by the engine."""

import pytest
from transformers import AutoTokenizer

from model_store.pair import open_pair
from recipes.teacher_text import own_questions
from server.config import Settings
from server.offline import OfflineEngine
from tests.api.tiny import make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return open_pair(*make_pair(tmp_path_factory.mktemp("pair")))


def test_questions_continue_a_users_turn_and_depend_on_the_seed(pair):
    heard = []

    class Engine(OfflineEngine):
        def generate(self, size, prompts, *rest, **named):
            heard.append(prompts)
            ends = min(self.ends)
            return [[*answer[:12], ends] for answer in super().generate(size, prompts, *rest, **named)]

    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path)
    engine, top = Engine(pair, Settings(device="cpu"), 256), pair.elasticity.sizes[-1]
    first, again, other = (own_questions(engine, tokenizer, top, 8, seed) for seed in (1, 1, 2))
    turn = tokenizer.decode(heard[0][0])
    assert "user" in turn and "QUESTION" not in turn and not turn.endswith("<|im_end|>")
    assert len(heard[0]) == 16 and 0 < len(first) <= 8 and len(set(first)) == len(first)
    assert first == again and first != other


def test_a_turn_that_does_not_end_is_no_question(pair):
    class Engine:
        def generate(self, size, prompts, *rest, **named):
            return [[5, 6, 7, 8, 9]] * len(prompts)

    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_path)
    assert own_questions(Engine(), tokenizer, 6, 4, 0) == []
