"""One bundle of a comparison: the measurements of its processes, and a description of its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.graph_bytes import TARGET, decoder_weight_bytes, graph_file_bytes
from pocketvlm.device_bench.plausibility import Physics
from pocketvlm.device_bench.summary import summarise_blocks
from pocketvlm.files.reader import file_sha256
from pocketvlm.reports.measurement import Environment, Latency, MeasuredBundle, Memory

__all__ = ["Arm"]


@dataclass(kw_only=True)
class Arm:
    """One bundle of a comparison.

    Attributes:
        bundle: The bundle.
        blocks: The measurement of each process, by repeat.
        failures: Why a process returned no result, by repeat.
    """

    bundle: Bundle
    blocks: dict[int, Block] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def latency(self) -> Latency:
        """Figures over all processes, in order; the last failure if there are none."""
        if self.blocks:
            return summarise_blocks([self.blocks[repeat] for repeat in sorted(self.blocks)])
        return Latency(failed=next(reversed(self.failures.values()), "it was never run"))

    def memory(self) -> Memory:
        """The largest resident sets of its processes, each of which held this bundle alone."""
        rows = [block.memory for block in self.blocks.values()]
        return Memory(
            before_load_rss_bytes=_largest(row.before_load_rss_bytes for row in rows),
            after_load_rss_bytes=_largest(row.after_load_rss_bytes for row in rows),
            peak_rss_bytes=_largest(row.peak_rss_bytes for row in rows),
        )

    def physics(self, environment: Environment) -> Physics:
        """What its figures must not contradict; requires the result of one process."""
        block = next(iter(self.blocks.values()))
        return Physics(
            prompt_tokens=block.cold.prompt_tokens,
            weight_bytes=graph_file_bytes(self.bundle),
            decoder_bytes=decoder_weight_bytes(self.bundle),
            memory_read_bytes_s=environment.memory_read_bytes_s,
            cache_bytes=environment.last_level_cache_bytes,
        )

    def describe(self) -> MeasuredBundle:
        """The bundle as its manifest and its files describe it."""
        manifest = self.bundle.manifest
        return MeasuredBundle(
            model=manifest.model,
            manifest_sha256=file_sha256(self.bundle.path / "manifest.json"),
            stored_bytes=self.bundle.stored_bytes(),
            decoder_weight_bytes=decoder_weight_bytes(self.bundle),
            visual_tokens=manifest.visual_tokens,
            visual_tokens_full=manifest.visual_tokens_full,
            kv_dtype=manifest.kv_cache.dtype,
            precision={
                part: label
                for component in manifest.components
                if component.target == TARGET
                for part, label in component.precision.items()
            },
        )


def _largest(counts: Iterable[int | None]) -> int | None:
    return max((count for count in counts if count is not None), default=None)
