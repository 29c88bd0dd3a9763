from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.context import Progress
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.controller import Process, bench_bundle, schedule
from pocketvlm.device_bench.measure import measure_block
from pocketvlm.device_bench.prompts import fit_turns
from pocketvlm.device_bench.protocol import BlockJob, EnvironmentJob, Failure
from pocketvlm.device_bench.summary import FIGURES
from pocketvlm.device_bench.transports.base import Connection, Transport, ignore_event
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import BundleError, InputError, PocketVLMError, UnsupportedError
from pocketvlm.json_io import decode, encode
from pocketvlm.reports.measurement import Latency, Measurement, ProcessFailure
from pocketvlm.reports.report_file import parse_report
from tests.device_bench.rig import block_job

WORKLOAD = Workload(name="tiny", image_size=64, prompt_tokens=48, new_tokens=6, answers=2)


@dataclass
class ScriptedTransport(Transport, Connection):
    """A device with scripted outcomes."""

    kind = "scripted"

    outcomes: list[Any]
    environment: Any = field(default_factory=lambda: {"threads": 1})
    jobs: list[BlockJob] = field(default_factory=list)

    def connect(self):
        return self

    def install(self, bundle):
        return str(bundle.path)

    def close(self):
        pass

    def run(self, job, *, timeout_s, on_event=ignore_event):
        if isinstance(job, EnvironmentJob):
            return self.environment
        self.jobs.append(job)
        outcome = self.outcomes.pop(0)
        return encode(outcome) if isinstance(outcome, Block) else outcome


def test_baseline_and_candidate_take_turns():
    processes = schedule(3, ("baseline", "candidate"))
    assert [process.role for process in processes] == ["baseline", "candidate"] * 3
    assert [process.repeat for process in processes] == [0, 0, 1, 1, 2, 2]
    assert schedule(2, ("candidate",)) == (
        Process(role="candidate", repeat=0),
        Process(role="candidate", repeat=1),
    )


def test_the_transport_sees_the_turns_in_this_order(tiny_bundle, tmp_path, block):
    (tmp_path / "other").symlink_to(tiny_bundle)
    transport = ScriptedTransport([block(1.0 if turn % 2 else 2.0) for turn in range(10)])
    seen: list[Progress] = []
    result = bench_bundle(
        tiny_bundle,
        WORKLOAD,
        baseline=tmp_path / "other",
        transport=transport,
        on_progress=seen.append,
    )
    assert [process.role for process in result.order] == ["baseline", "candidate"] * 5
    assert result.ratios["ttft_user_ms"] == pytest.approx(0.5)
    assert result.ratios["decode_tok_s"] == pytest.approx(2.0, rel=1e-4)
    assert [len(values) for values in result.ratio_samples.values()] == [5] * 14
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 10, 10)
    # Both bundles got the same picture.
    assert len({job.pictures for job in transport.jobs}) == 1
    json.dumps(encode(result), allow_nan=False)


def test_a_failed_repeat_stays_in_the_result_with_its_reason(tiny_bundle, block):
    outcomes = [block(), Failure(reason="ended by SIGKILL"), block(), block(), block()]
    result = bench_bundle(tiny_bundle, WORKLOAD, transport=ScriptedTransport(outcomes))
    assert result.failures == (
        ProcessFailure(role="candidate", repeat=1, reason="ended by SIGKILL"),
    )
    assert len(result.latency["onnx"].figure("load_ms").samples) == 4
    assert "candidate, repeat 2: failed: ended by SIGKILL" in result.notes


def test_what_a_device_sends_is_held_to_its_type(tiny_bundle, block):
    outcomes = [{**encode(block()), "load_ms": "soon"}, {"answer": 42}]
    result = bench_bundle(tiny_bundle, WORKLOAD, transport=ScriptedTransport(outcomes))
    reasons = [failure.reason for failure in result.failures]
    assert re.search('not a block: load_ms: must be a number, not "soon"', reasons[0])
    assert re.search("not a block: answer: unknown key", reasons[1])
    odd = ScriptedTransport([], environment={"threads": "two"})
    with pytest.raises(PocketVLMError, match=r"environment\.threads: must be a whole number"):
        bench_bundle(tiny_bundle, WORKLOAD, transport=odd)


def test_a_bundle_that_keeps_failing_is_given_up_and_its_baseline_is_not(
    tiny_bundle, tmp_path, block
):
    (tmp_path / "other").symlink_to(tiny_bundle)
    broken = Failure(reason="out of memory")
    outcomes = [block(), broken, block(), broken, block(), block(), block()]
    transport = ScriptedTransport(outcomes)
    result = bench_bundle(tiny_bundle, WORKLOAD, baseline=tmp_path / "other", transport=transport)
    assert len(transport.jobs) == 7
    assert result.latency["onnx"] == Latency(failed="out of memory")
    assert encode(result)["latency"]["onnx"] == {"failed": "out of memory"}
    assert result.memory.peak_rss_bytes is None
    assert result.baseline["onnx"].figure("load_ms").median == 100.0
    assert result.ratios == {}
    assert "candidate: 3 repeats were skipped after 2 failures" in result.notes


def test_a_noisy_machine_is_flagged_and_a_quiet_one_is_not(tiny_bundle, block):
    def run(scales):
        transport = ScriptedTransport([block(scale) for scale in scales])
        return bench_bundle(tiny_bundle, WORKLOAD, transport=transport)

    quiet, noisy = run([1.0, 1.01, 0.99, 1.02, 1.0]), run([1.0, 1.6, 0.8, 1.3, 2.0])
    assert quiet.stability.is_stable
    assert not any("noisy" in note for note in quiet.notes)
    assert not noisy.stability.is_stable
    assert any("noisy run" in note and "candidate" in note for note in noisy.notes)


def test_implausible_figures_and_changing_answers_are_noted(tiny_bundle, block):
    (answer,) = block().answers
    early = replace(answer, ttft_user_ms=1.0)
    blocks = [replace(block(token_ids=(1, 2, index)), answers=(early,)) for index in range(5)]
    result = bench_bundle(tiny_bundle, WORKLOAD, transport=ScriptedTransport(blocks))
    assert any("implausible: the user's time to first token" in note for note in result.notes)
    assert any("did not give the same tokens" in note for note in result.notes)


def test_wrong_input_is_one_clear_error(tiny_bundle, tmp_path):
    with pytest.raises(BundleError, match="no bundle here"):
        bench_bundle(tmp_path, WORKLOAD)
    with pytest.raises(InputError, match="'toaster' is not known; there are .*host"):
        bench_bundle(tiny_bundle, WORKLOAD, device="toaster")
    with pytest.raises(UnsupportedError, match="no transport to it in this version"):
        bench_bundle(tiny_bundle, WORKLOAD, device="galaxy-s25")
    silent = ScriptedTransport([], environment=Failure(reason="connection refused"))
    with pytest.raises(PocketVLMError, match="the device does not answer: connection refused"):
        bench_bundle(tiny_bundle, WORKLOAD, transport=silent)


@pytest.fixture(scope="module")
def measured(tiny_bundle) -> Block:
    """One real block, in this process."""
    return measure_block(block_job(tiny_bundle, WORKLOAD), 1)


def test_a_real_block_measures_what_it_says(measured, tiny_bundle):
    prompt = measured.prompt
    assert prompt.text_tokens == 48
    assert prompt.tokens == 48 + prompt.visual_tokens
    assert len(measured.answers) == 2
    assert measured.is_repeatable
    assert len(measured.token_ids[0]) == WORKLOAD.new_tokens
    memory = measured.memory
    assert 0 < memory.before_load_rss_bytes <= memory.peak_rss_bytes


def test_stages_add_up_to_the_times_that_contain_them(measured):
    for answer in (measured.cold, *measured.answers):
        first = [
            *(answer.preprocess_ms, answer.vision_ms, answer.tokenize_ms),
            *(answer.embed_ms, answer.prefill_ms),
        ]
        assert min(first) > 0
        first += [answer.sample_ms[0], answer.detokenize_ms[0]]
        assert answer.ttft_user_ms == pytest.approx(sum(first))
        assert answer.ttft_engine_ms == pytest.approx(answer.prefill_ms + answer.sample_ms[0])
        later = itertools.chain(answer.decode_ms, answer.sample_ms[1:], answer.detokenize_ms[1:])
        assert answer.decode_span_ms == pytest.approx(sum(later))
        assert len(answer.decode_ms) == WORKLOAD.new_tokens - 1


def test_the_measured_answer_is_the_one_that_a_user_gets(tiny_bundle, measured):
    """The timed loop generates the same tokens as `Conversation`."""
    import io

    from PIL import Image

    from pocketvlm.device_bench.workload import fit_prompt
    from pocketvlm.runtime.conversation import Conversation
    from pocketvlm.runtime.onnx.runner import OnnxRunner
    from pocketvlm.runtime.text import TextCodec, user_message

    bundle = Bundle.open(tiny_bundle)
    codec = TextCodec.from_bundle(bundle)

    def count_tokens(text: str) -> int:
        ids = codec.encode([user_message(text, images=1)])
        return sum(token != codec.image_token_id for token in ids)

    conversation = Conversation(bundle, runner=OnnxRunner(bundle, threads=1))
    with Image.open(io.BytesIO(WORKLOAD.image_bytes())) as image:
        answer = conversation.ask(
            fit_prompt(count_tokens, WORKLOAD.prompt_tokens), image, max_new_tokens=6
        )
    (ids,) = measured.token_ids
    ended = [index for index, token in enumerate(ids) if token in codec.eos_token_ids]
    assert tuple(answer.token_ids) == (ids[: ended[0]] if ended else ids)


def test_a_workload_beyond_the_positions_is_refused_before_anything_runs(tiny_bundle):
    long = Workload(name="long", prompt_tokens=400, new_tokens=200)
    with pytest.raises(InputError, match="takes 600 positions .* has 512"):
        fit_turns(Bundle.open(tiny_bundle), long, None)


def test_text_alone_has_no_picture_stages(tiny_bundle):
    text = Workload(name="text", prompt_tokens=24, new_tokens=2)
    block = measure_block(block_job(tiny_bundle, text), 1)
    assert block.answers[0].vision_ms is None
    assert (block.prompt.visual_tokens, block.prompt.tokens) == (0, 24)


def test_a_real_run_through_the_host_transport(tiny_bundle):
    """Ten processes of a tiny model have every figure, and none is implausible."""
    result = bench_bundle(tiny_bundle, WORKLOAD, baseline=tiny_bundle, threads=1)
    latency = result.latency["onnx"]
    for name in FIGURES:
        assert latency.figure(name).median > 0, name
    assert len(latency.figure("ttft_user_ms").samples) == 10
    assert len(latency.figure("load_ms").samples) == 5
    assert result.failures == ()
    assert {check.verdict for check in result.plausibility} <= {"pass", "not applicable"}
    memory = result.memory
    assert memory.before_load_rss_bytes < memory.peak_rss_bytes
    assert result.environment.threads == 1
    assert result.environment.device == "host"
    assert result.workload.prompt.text_tokens == 48
    assert result.bundles["candidate"].decoder_weight_bytes > 0
    assert not any("same tokens" in note for note in result.notes)
    # The document is decoded to an equal value; no key is unknown or lost.
    document = json.loads(json.dumps(encode(result)))
    assert decode(Measurement, document) == result
    assert parse_report(document).bench == result


def test_measuring_never_imports_torch():
    program = (
        "import sys, pocketvlm.device_bench.controller, pocketvlm.device_bench.worker,"
        "pocketvlm.reports.html, pocketvlm.device_bench.compare;"
        "bad = {'torch', 'transformers', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
