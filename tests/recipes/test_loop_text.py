"""The mixture of a size's loops and text from elsewhere: shares, and the seed."""

from recipes.loop_text import mixed

LOOP = {"prompt": "a", "response": "over and over " * 20, "said_by": 28}
PLAIN = [{"prompt": str(i), "response": " ".join(map(str, range(i, i + 40))), "said_by": 28} for i in range(5)]
ARTICLES = [{"text": f"article {i} " + "w" * 90} for i in range(50)]
BASE = [{"text": f"passage {i} " + "v" * 90} for i in range(50)] + [{"prompt": "q" * 50, "response": "r" * 50}] * 9


def words(text):
    return list(map(hash, text.split()))


def test_loops_are_kept_and_text_fills_up_to_its_shares():
    rows = mixed([LOOP, *PLAIN], ARTICLES, BASE, words, 10_000, 0.6, plain=2, seed=3)
    assert rows.count(LOOP) == 1
    others = [row for row in rows if row.get("response", "")[:1].isdigit()]
    assert len(others) == 2 and all(row["said_by"] == 28 for row in others)
    drawn = {kind: sum(row.get("text", "").startswith(kind) for row in rows) for kind in ("article", "passage")}
    assert 55 <= drawn["article"] <= 62 and 28 <= drawn["passage"] <= 31
    assert sum(row.get("prompt", "").startswith("q") for row in rows) == 10


def test_the_seed_decides():
    def mix(seed):
        return mixed([LOOP, *PLAIN], ARTICLES, BASE, words, 2_000, 0.5, 1, seed)

    assert mix(1) == mix(1) != mix(2)
