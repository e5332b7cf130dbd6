"""The limits on what is in flight between producer and consumer: resolved and checked here, once."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_core.errors import SpecError
from disagg_core.run_spec.document import RolloutSection

_STORE_SHARE = 0.8
_FACTORS = "training.processes x nodes / context_parallel x batch_size x accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """Limits on what is in flight. A low watermark left out is half of the high one, but at least a window.

    `window` is the samples of one optimizer step (`RunSpec.global_batch_size`) and `max_sample_bytes` the largest
    sample; together they say how many bytes a window may need. Byte limits are off when `high_bytes` is None.

    Raises:
        SpecError: with these limits the two sides would wait for each other for ever, or they contradict each other.
    """

    window: int
    high_refs: int
    low_refs: int | None = None
    high_bytes: int | None = None
    low_bytes: int | None = None
    max_sample_bytes: int = 0

    @classmethod
    def resolve(
        cls, rollout: RolloutSection, window: int, *, max_sample_bytes: int = 0, store_capacity: int | None = None
    ) -> Watermarks:
        """Return the limits of a rollout section for optimizer steps of `window` samples.

        With `store_capacity`, in bytes, there is always a limit in bytes: 80% of it where the section has none.

        Raises:
            SpecError: as the class does, or the store is too small for a window or for the limit.
        """
        high_bytes = rollout.high_watermark_bytes
        if store_capacity is not None:
            needed = window * max_sample_bytes
            if store_capacity < needed:
                raise SpecError(
                    f"store.capacity: expected at least {needed} bytes, one optimizer window of {window} samples "
                    f"({_FACTORS}) of up to {max_sample_bytes} bytes each, found {store_capacity}; raise it, or lower "
                    "data.max_tokens"
                )
            high_bytes = high_bytes or int(store_capacity * _STORE_SHARE)
            if high_bytes > store_capacity:
                raise SpecError(
                    f"rollout.high_watermark_bytes: expected at most store.capacity ({store_capacity}), "
                    f"found {high_bytes}; lower it, or raise store.capacity"
                )
        return cls(
            window=window,
            high_refs=rollout.high_watermark_refs,
            low_refs=rollout.low_watermark_refs,
            high_bytes=high_bytes,
            low_bytes=rollout.low_watermark_bytes,
            max_sample_bytes=max_sample_bytes,
        )

    def __post_init__(self) -> None:
        if self.window < 1:
            raise SpecError(f"expected an optimizer window of at least 1 sample, found {self.window}")
        samples = f"one optimizer window of {self.window} samples ({_FACTORS})"
        _check("refs", self.window, samples, self.high_refs, self.low_refs, "raise it, or make the window smaller")
        if self.high_bytes is not None:
            needed = self.window * self.max_sample_bytes
            wanted = f"{needed} bytes, {samples} of up to {self.max_sample_bytes} bytes each"
            way_out = "raise it (and store.capacity), or lower data.max_tokens"
            _check("bytes", needed, wanted, self.high_bytes, self.low_bytes, way_out)
        elif self.low_bytes is not None:
            raise SpecError(
                f"rollout.low_watermark_bytes: {self.low_bytes} bytes have no effect without high_watermark_bytes"
            )

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


def _check(limit: str, needed: int, window: str, high: int, low: int | None, way_out: str) -> None:
    """Refuse watermarks below `needed`, which is what a `window` takes, and a low one above the high one."""
    for name, found in (("high", high), ("low", low)):
        if found is not None and found < needed:
            raise SpecError(
                f"rollout.{name}_watermark_{limit}: expected at least {window}, found {found}: producer and trainer "
                f"would wait for each other for ever; {way_out}"
            )
    if low is not None and low > high:
        raise SpecError(
            f"rollout: expected low watermarks at or below the high ones, found low_watermark_{limit} {low} above "
            f"high_watermark_{limit} {high}"
        )
