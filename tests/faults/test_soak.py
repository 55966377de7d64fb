"""A few seconds of what `make soak` does for half an hour."""

from benchmarks import soak


def test_a_short_soak_finds_nothing(pair):
    flags = ["--teacher", str(pair[0]), "--student", str(pair[1]), "--executor", "torch", "--num-threads", "1"]
    flags += ["--max-model-len", "256", "--kv-cache-memory", "16MiB", "--page-size", "8"]
    options = ["--minutes", "0.05", "--capacity-seconds", "1", "--cases", "16", "--", *flags]
    report, problems = soak.run(soak.parser().parse_args(options))
    assert problems == []
    assert report["outcomes"]["answered"] > 10 and report["greedy_cases_compared"] > 2
