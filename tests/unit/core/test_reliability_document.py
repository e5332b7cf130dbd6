"""docs/reliability.md says what the records of the chaos tier say."""

from __future__ import annotations

import pytest

from tests.chaos.record import DOCUMENT, as_markdown, read_records

pytestmark = pytest.mark.unit


def test_the_document_is_that_of_the_records() -> None:
    records = read_records()
    assert records
    assert DOCUMENT.read_text() == as_markdown(records)
    for record in records:
        assert record.trained + record.rejected + record.quarantined == record.prompts
        assert record.left == []
