from __future__ import annotations

from pathlib import Path

from llada_mega.data.text import python_prose, python_sources, write_jsonl


def paragraphs(documents: list[tuple[str, str]], shortest: int = 80) -> set[str]:
    normalised = (" ".join(part.split()) for _, text in documents for part in text.split("\n\n"))
    return {part for part in normalised if len(part) >= shortest}


def test_prose_is_split_without_leaks() -> None:
    train, held_out, both = (list(python_prose(side)) for side in (False, True, None))
    assert sorted(train + held_out) == both and len(both) > 40
    assert paragraphs(train) and paragraphs(held_out)
    assert not paragraphs(train) & paragraphs(held_out)
    share = sum(len(text) for _, text in held_out) / sum(len(text) for _, text in both)
    assert 0.1 < share <= 0.2
    assert sum(len(text) for _, text in held_out) > 50_000  # 64 windows of 128 tokens and more
    assert list(python_prose(True)) == held_out


def test_repeated_topics_are_left_out() -> None:
    both = dict(python_prose())
    assert "compound" in both
    assert not {"for", "while", "if"} & set(both)  # compound holds them


def test_sources_are_the_standard_library_without_the_prose() -> None:
    train, held_out = (dict(python_sources(side)) for side in (False, True))
    assert not set(train) & set(held_out)
    assert len(train) > 300 and 0.02 < len(held_out) / len(train) < 0.1
    assert "textwrap.py" in {**train, **held_out}
    assert not any(
        "pydoc_data" in name or "site-packages" in name or "/test/" in name for name in {**train, **held_out}
    )


def test_jsonl(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "a.jsonl", [("x", "one\ntwo"), ("y", "ü")]) == 2
    assert (tmp_path / "a.jsonl").read_text().count("\n") == 2
