"""Short names for paths."""

from __future__ import annotations

from utils.names import distinct_suffixes


def test_suffixes_are_as_long_as_needed() -> None:
    assert distinct_suffixes(["/a/x", "/b/y"]) == ["x", "y"]
    assert distinct_suffixes(["/a/1/x", "/b/1/x"]) == ["a/1/x", "b/1/x"]
    assert distinct_suffixes(["en/corpus_text_document", "de/corpus_text_document", "web"]) == [
        "en/corpus_text_document",
        "de/corpus_text_document",
        "web",
    ]
    assert distinct_suffixes(["x"]) == ["x"] and distinct_suffixes([]) == []


def test_a_source_has_the_curve_of_nothing_else() -> None:
    taken = ("loss", "perplexity")
    assert distinct_suffixes(["a/en", "a/de"], taken) == ["en", "de"]
    assert distinct_suffixes(["a/loss", "a/web"], taken) == ["a/loss", "a/web"]
    assert distinct_suffixes(["loss", "web", "perplexity"], taken) == ["./loss", "web", "./perplexity"]


def test_equal_paths_keep_all_parts() -> None:
    assert distinct_suffixes(["a/x", "a/x"]) == ["a/x", "a/x"]
