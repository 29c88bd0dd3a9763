from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.context import Progress
from pocketvlm.device_bench.arm import Arm, open_arms, pair_all
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.controller.bench import BenchOptions, bench_bundles
from pocketvlm.device_bench.controller.prompts import fit_turns
from pocketvlm.device_bench.figures.result import assemble_measurement
from pocketvlm.device_bench.figures.summary import FIGURES
from pocketvlm.device_bench.protocol import Failure
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.schedule import Outcome, Process, schedule
from pocketvlm.device_bench.transports.simulated import SimulatedTransport
from pocketvlm.device_bench.workload import Workload, vary_workload
from pocketvlm.errors import BundleError, InputError, PocketVLMError
from pocketvlm.json_io import decode, encode
from pocketvlm.reports.measurement import Environment, Latency, Measurement, ProcessFailure
from pocketvlm.reports.report_file import parse_report
from tests.device_bench.rig import SCRIPTED, ScriptedTransport, bench, block_job

WORKLOAD = Workload(name="tiny", image_size=64, prompt_tokens=48, new_tokens=6, answers=2)


def test_arms_take_turns():
    processes = schedule(3, ("a", "b", "c"))
    assert [process.arm for process in processes] == ["a", "b", "c"] * 3
    assert [process.repeat for process in processes] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert schedule(2, ("a",)) == (Process(arm="a", repeat=0), Process(arm="a", repeat=1))


def test_the_transport_sees_the_turns_in_this_order(tiny_bundle, other, block):
    transport = ScriptedTransport([block(1.0 if turn % 2 else 2.0) for turn in range(10)])
    seen: list[Progress] = []
    result = bench([other, tiny_bundle], transport=transport, on_progress=seen.append)
    assert [process.arm for process in result.order] == ["base", "bundle"] * 5
    assert (result.reference, list(result.compared)) == ("base", ["bundle"])
    arm = result.arms["bundle"]
    assert arm.ratios["ttft_user_ms"] == pytest.approx(0.5)
    assert arm.ratios["decode_tok_s"] == pytest.approx(2.0, rel=1e-4)
    assert [len(values) for values in arm.ratio_samples.values()] == [5] * 14
    assert result.arms["base"].ratios == {}
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 10, 10)
    # Both bundles got the same picture.
    assert len({job.pictures for job in transport.jobs}) == 1
    json.dumps(encode(result), allow_nan=False)


def test_the_digest_of_the_prompt_is_that_of_the_job_whichever_runner_did_it(tiny_bundle, block):
    transport = ScriptedTransport([block() for _ in range(5)])
    (arm,) = bench([tiny_bundle], transport=transport).arms.values()
    text = transport.jobs[0].turns[0].text
    assert arm.prompt.text_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert arm.bundle.max_positions == 512


def test_names_of_arms_differ(tiny_bundle, other, tmp_path):
    def names(*bundles):
        return [arm.name for arm in open_arms(pair_all(bundles))]

    assert names(tiny_bundle, other) == ["bundle", "base"]
    assert names(tiny_bundle, tiny_bundle) == ["bundle", "bundle #2"]
    (tmp_path / "runs" / "bundle").parent.mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "runs" / "bundle")
    parent = tiny_bundle.parent.name
    assert names(tiny_bundle, tmp_path / "runs" / "bundle") == [f"{parent}/bundle", "runs/bundle"]


def test_a_runtime_that_a_bundle_lacks_is_one_line(tiny_bundle):
    with pytest.raises(InputError, match="bundle: has no graphs for executorch; it has onnx"):
        open_arms(pair_all([tiny_bundle], ["onnx", "executorch"]))
    with pytest.raises(InputError, match="runtime is 'tensorrt'; allowed are onnx, executorch"):
        open_arms(pair_all([tiny_bundle], ["tensorrt"]))
    with pytest.raises(InputError, match="'onnx' is named 2 times"):
        pair_all([tiny_bundle], ["onnx", "onnx"])
    with pytest.raises(InputError, match="no bundle"):
        open_arms([])


def test_a_failed_repeat_stays_in_the_result_with_its_reason(tiny_bundle, block):
    outcomes = [block(), Failure(reason="ended by SIGKILL"), block(), block(), block()]
    result = bench([tiny_bundle], transport=ScriptedTransport(outcomes))
    arm = result.arms["bundle"]
    assert arm.failures == (ProcessFailure(repeat=1, reason="ended by SIGKILL"),)
    assert len(arm.latency.figure("load_ms").samples) == 4
    assert "bundle, repeat 2: failed: ended by SIGKILL" in result.notes


def test_what_a_device_sends_is_held_to_its_type(tiny_bundle, block):
    outcomes = [{**encode(block()), "load_ms": "soon"}, {"answer": 42}]
    result = bench([tiny_bundle], transport=ScriptedTransport(outcomes))
    reasons = [failure.reason for failure in result.arms["bundle"].failures]
    assert re.search('not a block: load_ms: must be a number, not "soon"', reasons[0])
    assert re.search("not a block: answer: unknown key", reasons[1])
    odd = ScriptedTransport([], environment={"threads": "two"})
    with pytest.raises(PocketVLMError, match=r"environment\.threads: must be a whole number"):
        bench([tiny_bundle], transport=odd)


def test_an_arm_that_keeps_failing_is_given_up_and_the_reference_is_not(tiny_bundle, other, block):
    broken = Failure(reason="out of memory")
    transport = ScriptedTransport([block(), broken, block(), broken, block(), block(), block()])
    result = bench([other, tiny_bundle], transport=transport)
    assert len(transport.jobs) == 7
    arm, reference = result.arms["bundle"], result.arms["base"]
    assert arm.latency == Latency(failed="out of memory")
    assert encode(arm)["latency"] == {"failed": "out of memory"}
    assert arm.memory.peak_rss_bytes is None
    assert reference.latency.figure("load_ms").median == 100.0
    assert arm.ratios == {}
    assert "bundle: 3 of 5 repeats were not run, after 2 failures" in result.notes


def test_two_runtimes_of_one_bundle_are_arms_whose_answers_are_compared(tiny_bundle, block):
    arms = (
        Arm(name=f"bundle ({name})", bundle=Bundle.open(tiny_bundle), runtime=name)
        for name in ("onnx", "executorch")
    )
    outcomes = [
        Outcome(process=Process(arm=f"bundle ({name})", repeat=0), block=block(token_ids=ids))
        for name, ids in (("onnx", (1, 2, 3, 4)), ("executorch", (1, 9, 3, 4)))
    ]
    result = assemble_measurement(
        tuple(arms), outcomes, workload=SCRIPTED, pictures=(), environment=Environment()
    )
    assert list(result.arms) == ["bundle (onnx)", "bundle (executorch)"]
    parts = "bundle (executorch): its answer parts from that of bundle (onnx) after 1 of 4 tokens"
    assert parts in result.notes


def test_a_grid_is_one_measurement_for_each_of_its_cells(tiny_bundle):
    grid = vary_workload(SCRIPTED, image_sizes=(32, 64), prompt_tokens=(48, 60))
    results = bench_bundles(pair_all([tiny_bundle]), grid, transport=SimulatedTransport())
    shapes = [(one.workload.image_size, one.workload.prompt_tokens) for one in results]
    assert shapes == [(32, 48), (32, 60), (64, 48), (64, 60)]
    assert results[1].workload.name == "tiny, 32 px, 60 tokens"
    assert all(one.arms["bundle"].latency.failed is None for one in results)


def test_a_noisy_machine_is_flagged_and_a_quiet_one_is_not(tiny_bundle, block):
    def run(scales):
        return bench([tiny_bundle], transport=ScriptedTransport([block(one) for one in scales]))

    quiet, noisy = run([1.0, 1.01, 0.99, 1.02, 1.0]), run([1.0, 1.6, 0.8, 1.3, 2.0])
    assert quiet.arms["bundle"].stability.is_stable
    assert not any("noisy" in note for note in quiet.notes)
    assert not noisy.arms["bundle"].stability.is_stable
    assert any("noisy run" in note and "bundle" in note for note in noisy.notes)


def test_implausible_figures_and_changing_answers_are_noted(tiny_bundle, block):
    (answer,) = block().answers
    early = replace(answer, ttft_engine_ms=5.0)  # 40 tokens at 2,000 tok/s take 20
    blocks = [replace(block(token_ids=(1, 2, index)), answers=(early,)) for index in range(5)]
    result = bench([tiny_bundle], transport=ScriptedTransport(blocks))
    assert result.arms["bundle"].withheld == {"ttft_engine_ms", "prefill_tok_s"}
    assert any("not published: ttft_engine_ms" in note for note in result.notes)
    assert any("did not give the same tokens" in note for note in result.notes)


def test_wrong_input_is_one_clear_error(tiny_bundle, tmp_path):
    with pytest.raises(BundleError, match="no bundle here"):
        bench([tmp_path])
    silent = ScriptedTransport([], environment=Failure(reason="connection refused"))
    with pytest.raises(PocketVLMError, match="the device does not answer: connection refused"):
        bench([tiny_bundle], transport=silent)


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

    from pocketvlm.device_bench.workload import fit_text
    from pocketvlm.runtime.conversation import Conversation
    from pocketvlm.runtime.onnx.runner import OnnxRunner
    from pocketvlm.runtime.text import TextCodec, user_message

    bundle = Bundle.open(tiny_bundle)
    codec = TextCodec.from_bundle(bundle)

    def count_tokens(text: str) -> int:
        ids = codec.encode([user_message(text, images=1)])
        return sum(token != codec.image_token_id for token in ids)

    conversation = Conversation(bundle, runner=OnnxRunner(bundle, threads=1))
    with Image.open(io.BytesIO(WORKLOAD.encoded_pictures()[0])) as image:
        answer = conversation.ask(
            fit_text(count_tokens, WORKLOAD.prompt_tokens), image, max_new_tokens=6
        )
    (ids,) = measured.token_ids
    ended = [index for index, token in enumerate(ids) if token in codec.eos_token_ids]
    assert tuple(answer.token_ids) == (ids[: ended[0]] if ended else ids)


def test_a_workload_beyond_the_positions_is_refused_before_anything_runs(tiny_bundle):
    long = Workload(name="long", prompt_tokens=400, new_tokens=200)
    with pytest.raises(InputError, match="takes 600 positions .* has 512"):
        fit_turns(Bundle.open(tiny_bundle), long, ())


def test_text_alone_has_no_picture_stages(tiny_bundle):
    text = Workload(name="text", prompt_tokens=24, new_tokens=2)
    block = measure_block(block_job(tiny_bundle, text), 1)
    assert block.answers[0].vision_ms is None
    assert (block.prompt.visual_tokens, block.prompt.tokens) == (0, 24)


def test_a_real_run_through_the_host_transport(tiny_bundle):
    """Ten processes of a tiny model have every figure, and none is implausible."""
    result = bench([tiny_bundle, tiny_bundle], WORKLOAD, options=BenchOptions(threads=1))
    assert list(result.arms) == ["bundle", "bundle #2"]
    for arm in result.arms.values():
        for name in FIGURES:
            assert arm.latency.figure(name).median > 0, name
        assert len(arm.latency.figure("ttft_user_ms").samples) == 10
        assert len(arm.latency.figure("load_ms").samples) == 5
        assert arm.failures == ()
        assert {check.verdict for check in arm.plausibility} <= {"pass", "not applicable"}
        assert arm.memory.before_load_rss_bytes < arm.memory.peak_rss_bytes
        assert arm.prompt.text_tokens == 48
        assert arm.bundle.decoder_weight_bytes > 0
    assert result.environment.threads == 1
    assert result.environment.device == "host"
    assert not any("same tokens" in note for note in result.notes)
    # The document is decoded to an equal value; no key is unknown or lost.
    document = json.loads(json.dumps(encode(result)))
    assert decode(Measurement, document) == result
    assert parse_report({"bench": document}).bench == result


def test_measuring_never_imports_torch():
    program = (
        "import sys, pocketvlm.device_bench.controller.bench, pocketvlm.device_bench.runner.worker,"
        "pocketvlm.reports.html, pocketvlm.device_bench.gate.compare;"
        "bad = {'torch', 'transformers', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
