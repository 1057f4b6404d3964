"""The code blocks of pages in docs run, in order, those of a page as one program."""

import tempfile

import pytest
from doc_blocks import blocks_of, run_blocks

# Pages, and how many blocks they have at least. export.md runs in tests/core/test_export.py.
PAGES = [
    ("serving.md", 15),
    ("sharding.md", 5),
    ("prefill.md", 3),
    ("packed.md", 2),
    ("gradients.md", 1),
]


@pytest.mark.parametrize(("name", "least"), PAGES)
def test_the_code_blocks_run(tmp_path, monkeypatch, name, least):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the page makes its checkpoint
    run_blocks(name, at_least=least)


def test_each_form_of_sharding_is_short():
    for line, code in blocks_of("sharding.md"):
        assert code.count("\n") <= 20, line
