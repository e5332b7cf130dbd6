"""Secrets do not reach what is kept; what only looks like one word of them does."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_core.report.archive import archive_files, verify_archive
from disagg_core.storage.redaction import redact, redacted_environment, redaction_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("cannot reach redis://user:hunter2@host:6379/0", "cannot reach redis://user:***@host:6379/0"),
        ("redis://:hunter2@host", "redis://:***@host"),
        ("Authorization: Bearer abcdefghijkl.mnop", "Authorization: Bearer ***"),
        ('{"api_key": "abc123", "x": 1}', '{"api_key": "***", "x": 1}'),
        ("aws_secret_access_key=abc/def+ghi", "aws_secret_access_key=***"),
        ("export HF_TOKEN=hf_abcdefghijklmnopqrst", "export HF_TOKEN=***"),
        ("used hf_abcdefghijklmnopqrst", "used hf_***"),
        ("https://b/x?X-Amz-Signature=0f0f&y=1", "https://b/x?X-Amz-Signature=***&y=1"),
        ('{"password": null}', '{"password": null}'),
        ('{"bos_token": "<s>", "tokens": 512, "tokenizer_version": "ab12"}',) * 2,
        ("http://127.0.0.1:4200/api and s3://bucket/a@b",) * 2,
        ("step 3: loss 2.5, 12 tokens/s",) * 2,
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, kept: str) -> None:
    assert redact(text) == kept
    assert redact(kept) == kept


def test_the_environment_keeps_names_and_loses_secrets() -> None:
    found = redacted_environment(
        {"DRAFTLINE_REDIS_PASSWORD": "hunter2!", "HF_HOME": "/hub", "NCCL_X": "see hunter2!", "MC_URL": "a://u:p@h"}
    )
    assert found == {
        "DRAFTLINE_REDIS_PASSWORD": "***",
        "HF_HOME": "/hub",
        "MC_URL": "a://u:***@h",
        "NCCL_X": "see ***",
    }


def test_a_file_is_changed_line_by_line_whatever_its_blocks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "correct horse")
    changed = redaction_of("attempts/1/logs/producer.log")
    assert changed is not None
    content = "first\r\nit is correct horse\n\xff\n\nlast".encode("latin-1")
    for size in (1, 7, 1000):
        blocks = [content[start : start + size] for start in range(0, len(content), size)]
        assert b"".join(changed(blocks)) == content.replace(b"correct horse", b"***")
    assert redaction_of("metrics/train.jsonl") is None
    assert redaction_of("checkpoints/step-1/trainer.json") is None


def test_an_archive_has_no_secrets_and_the_run_keeps_its_files(tmp_path: Path) -> None:
    log = tmp_path / "producer.log"
    log.write_text("started\ncannot reach redis://:hunter2@host\n" * 3)
    before = log.read_bytes()
    archive_files({"logs/producer.log": log}, str(tmp_path / "archive"))
    kept = (tmp_path / "archive" / "logs" / "producer.log").read_text()
    assert kept == "started\ncannot reach redis://:***@host\n" * 3
    assert log.read_bytes() == before
    assert verify_archive(str(tmp_path / "archive")) == 1
