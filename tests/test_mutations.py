"""The table of mutations fits the sources; `make mutations` runs it."""

from dataclasses import replace

import mutations


def test_every_mutation_has_its_text_once_and_its_tests_exist() -> None:
    assert mutations.misfits() == []
    assert len({row.name for row in mutations.MUTATIONS}) == len(mutations.MUTATIONS)
    assert all(row.source != row.replacement for row in mutations.MUTATIONS)


def test_a_row_that_no_longer_fits_is_named(monkeypatch) -> None:
    row = replace(mutations.MUTATIONS[0], name="stale", source="no such text", tests=("tests/test_none.py", "-k", "x"))
    monkeypatch.setattr(mutations, "MUTATIONS", (row,))
    assert mutations.misfits() == [
        f"stale: expected its text once in {row.file}, found it 0 times",
        "stale: no file tests/test_none.py",
    ]
    assert mutations.main([]) == 2
