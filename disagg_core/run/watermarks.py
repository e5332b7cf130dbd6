"""The limits on what is in flight between producer and consumer."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """Limits on what is in flight. A low watermark left out is half of the high one, but at least a window.

    `window` is the optimizer window in references (``world_size * batch_size * accumulation_steps``) and
    `max_sample_bytes` the largest sample; together they say how many bytes a window may need. Byte limits are off
    when `high_bytes` is None.
    """

    window: int
    high_refs: int
    low_refs: int | None = None
    high_bytes: int | None = None
    low_bytes: int | None = None
    max_sample_bytes: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise BadInput(f"expected an optimizer window of at least 1 reference, found {self.window}")
        _check("references", self.window, self.high_refs, self.low_refs)
        if self.high_bytes is not None:
            _check("bytes", self.window * self.max_sample_bytes, self.high_bytes, self.low_bytes)
        elif self.low_bytes is not None:
            raise BadInput(f"a low watermark of {self.low_bytes} bytes has no effect without a high watermark in bytes")

    @property
    def resume_refs(self) -> int:
        """References in flight at which publishing goes on."""
        return self.low_refs if self.low_refs is not None else max(self.window, self.high_refs // 2)

    @property
    def resume_bytes(self) -> int:
        """Bytes in flight at which publishing goes on; only meaningful with byte limits."""
        if self.low_bytes is not None:
            return self.low_bytes
        return max(self.window * self.max_sample_bytes, (self.high_bytes or 0) // 2)


def _check(unit: str, window: int, high: int, low: int | None) -> None:
    if high < window:
        raise BadInput(
            f"the high watermark of {high} {unit} is smaller than one optimizer window of {window} {unit}: producer "
            f"and consumer would wait for each other for ever; set it to at least {window}, or make the window "
            "(world size x batch size x accumulation steps) smaller"
        )
    if low is None:
        return
    if low < window:
        raise BadInput(
            f"the low watermark of {low} {unit} is smaller than one optimizer window of {window} {unit}: a paused "
            f"producer could leave the consumer less than a window; set it to at least {window}"
        )
    if low > high:
        raise BadInput(f"the low watermark of {low} {unit} is above the high watermark of {high} {unit}")
