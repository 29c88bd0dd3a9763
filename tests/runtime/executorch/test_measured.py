"""A program in its separate process is measured as a graph in this one is."""

from __future__ import annotations

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import Turn
from pocketvlm.device_bench.runner.measure import measure_block
from tests.device_bench.runner.test_measure import check_conversation, conversation_job


def test_stages_turns_and_memory_of_a_program_are_counted(both_targets: Bundle) -> None:
    turns = (Turn(text="What is it?", pictures=(0,)), Turn(text="Why?"))
    job = conversation_job(both_targets.path, runtime="executorch", turns=turns, sustained_s=None)
    block = measure_block(job, 1)
    check_conversation(block, job)
    assert min(*block.cold.decode_ms, block.cold.vision_ms or 0, block.cold.prefill_ms) > 0
    memory = block.memory
    assert memory.before_load_rss_bytes is not None
    assert memory.after_load_rss_bytes is not None
    assert memory.peak_rss_bytes is not None
    # The process of the program has torch in it, whatever this one holds.
    assert memory.after_load_rss_bytes - memory.before_load_rss_bytes > 100_000_000
    assert memory.peak_rss_bytes >= memory.after_load_rss_bytes
