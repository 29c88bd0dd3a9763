"""verify-coreml and inspect --evaluate, with a stand-in where Core ML would be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle, sign_bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.device_bench.arm import pair_all
from pocketvlm.device_bench.controller.bench import bench_bundles
from pocketvlm.device_bench.workload import load_workload
from pocketvlm.errors import (
    BundleError,
    CheckFailedError,
    CheckpointError,
    RecipeError,
    UnsupportedError,
)
from pocketvlm.pipeline.questions import Questions
from pocketvlm.pipeline.verify_coreml import evaluate_coreml, verify_coreml
from pocketvlm.runtime.coreml.session import RemoteRunner, measure_function
from tests.forked import fork_cli
from tests.runtime.coreml.rig import stand_in, write_coreml_bundle

ASKED = Questions(n=2, tokens=4)
CTX = RunContext(threads=1)


@pytest.fixture(scope="module")
def made(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a checkpoint and its Core ML bundle; read-only by agreement."""
    run = tmp_path_factory.mktemp("run")
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    checkpoint.save(run / "checkpoint")
    write_coreml_bundle(checkpoint, run / "bundle")
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def verify(run: Path, mode: str, **options):
    return verify_coreml(run / "bundle", ASKED, CTX, iterations=2, worker=stand_in(mode), **options)


def test_a_verification_is_written_into_the_bundle(run: Path) -> None:
    before = Bundle.open(run / "bundle")
    found = verify(run, "answers", units="CPU_ONLY")
    assert found.failures == ()
    assert found.certificate is not None
    assert found.certificate.passed
    (target,) = found.certificate.targets
    assert target.details["engine"] == "a stand-in for Core ML, compute units CPU_ONLY"
    assert target.precision == "float16"
    after = Bundle.open(run / "bundle")  # every digest holds
    assert after.manifest.components == before.manifest.components
    changed = {
        name
        for name, digest in after.manifest.files.items()
        if before.manifest.files.get(name) != digest
    }
    assert changed == {"parity.json"}
    document = json.loads((run / "bundle" / "parity.json").read_text())["core_ml"]
    assert document == found.to_json()
    names = [(f["file"], f["function"]) for f in document["functions"]]
    assert names == [
        ("coreml/vision.mlpackage", None),
        ("coreml/decoder.mlpackage", "embedding"),
        ("coreml/decoder.mlpackage", "prefill"),
        ("coreml/decoder.mlpackage", "decode"),
    ]
    for function in document["functions"]:
        assert len(function["predict_ms"]["samples"]) == 2
        assert sum(function["operator_shares"].values()) == pytest.approx(1)
        assert sum(function["cost_shares"].values()) == pytest.approx(1)
    assert 0 < document["functions"][2]["operator_shares"]["neural_engine"] < 0.5
    assert "layer_norm" in document["functions"][2]["not_on_neural_engine"]
    assert {p.name for p in run.iterdir()} == {"bundle", "checkpoint"}


def test_what_was_certified_before_stays(run: Path) -> None:
    parity = run / "bundle" / "parity.json"
    parity.write_text(json.dumps({"passed": True, "targets": {"onnx": {}}}))
    sign_bundle(run / "bundle", Bundle.open(run / "bundle", verify=False).manifest)
    verify(run, "answers")
    document = json.loads(parity.read_text())
    assert document["targets"] == {"onnx": {}}
    assert document["core_ml"]["passed"]


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("dies", "the process was ended by signal 9, and left no"),
        ("exits", "the process ended with 0, and left no"),
        ("raises", "Error in building plan."),
        ("garbled", "not a frame of arrays"),
    ],
)
def test_a_runtime_that_fails_is_a_failed_verification(run: Path, mode: str, said: str) -> None:
    found = verify(run, mode)
    assert found.certificate is None
    assert said in found.failures[0]
    assert len(found.failures) == 5  # the certificate and four functions, each on its own
    assert all("\n" not in line for line in found.failures)
    document = json.loads((run / "bundle" / "parity.json").read_text())["core_ml"]
    assert document["passed"] is False
    assert document["failures"] == list(found.failures)
    Bundle.open(run / "bundle")


def test_a_runtime_that_computes_something_else_fails_the_certificate(run: Path) -> None:
    found = verify(run, "wrong")
    assert found.certificate is not None
    assert not found.certificate.passed
    assert any("prefill.sqnr_db" in line for line in found.failures)
    assert len(found.functions) == 4


def test_a_runtime_that_does_not_return_is_ended(made: Path) -> None:
    bundle = Bundle.open(made / "bundle", verify=False)
    runner = RemoteRunner(bundle, units="ALL", worker=stand_in("hangs"), timeout_s=30)
    runner._timeout_s = 0.5
    with pytest.raises(CheckFailedError, match=r"Core ML, embed: no answer within 0\.5 s"):
        runner.embed([1])
    runner.close()
    with pytest.raises(CheckFailedError, match="no answer within 3 s"):
        measure_function(
            made / "bundle" / "coreml" / "vision.mlpackage",
            None,
            units="ALL",
            iterations=1,
            worker=stand_in("hangs"),
            timeout_s=3,
        )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "left no result"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"load_ms": [1], "predict_ms": [], "plan": []}', "not complete"),
        ('{"load_ms": [1], "predict_ms": ["1"], "plan": []}', "not complete"),
        ('{"load_ms": [1], "predict_ms": [1], "plan": [{"operator": "add"}]}', "not complete"),
    ],
)
def test_only_a_complete_result_is_believed(tmp_path: Path, content: str | None, said: str) -> None:
    """Exit code 0 says nothing."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, pathlib\n"
        "request = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        f"content = {content!r}\n"
        "if content is not None:\n"
        "    pathlib.Path(request['result']).write_text(content)\n"
    )
    with pytest.raises(CheckFailedError, match=said):
        measure_function(
            tmp_path, "decode", units="ALL", iterations=1, worker=(sys.executable, str(script))
        )


def test_the_evaluator_certifies_what_is_on_disk(run: Path) -> None:
    report = evaluate_coreml(run / "bundle", ASKED, CTX)
    assert report.passed, report.failures()
    (target,) = report.targets
    assert "not Core ML" in target.details["engine"]
    # One byte of one scale, and the digest made to fit: only the evaluator sees it.
    weights = run / "bundle" / "coreml" / "decoder.mlpackage" / "Data" / "com.apple.CoreML"
    file = weights / "weights" / "weight.bin"
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 4000, 2):
        data[place + 1] ^= 0x80
    file.write_bytes(data)
    sign_bundle(run / "bundle", Bundle.open(run / "bundle", verify=False).manifest)
    assert not evaluate_coreml(run / "bundle", ASKED, CTX).passed


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
def test_without_an_apple_machine_it_is_refused_in_one_line(made: Path) -> None:
    with pytest.raises(UnsupportedError, match="Apple machines alone"):
        verify_coreml(made / "bundle", ASKED, CTX)
    finished = fork_cli("verify-coreml", made / "bundle", check=2)
    assert finished.stderr.count("\n") == 1
    assert "inspect BUNDLE --evaluate" in finished.stderr


def test_wrong_input_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="units are 'NPU'; allowed are ALL"):
        verify(made, "answers", units="NPU")
    copy = Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        evaluate_coreml(copy, ASKED, CTX)
    with pytest.raises(UnsupportedError, match="the engine of coreml is not on this host"):
        bench_bundles(pair_all([copy]), [load_workload("short")])
    with pytest.raises(BundleError, match="no bundle here"):
        verify(tmp_path / "nothing", "answers")


def test_the_command_line_prints_the_table(made: Path) -> None:
    finished = fork_cli("inspect", made / "bundle", "--evaluate", "--n", "2", "--json", check=0)
    assert "reference evaluator" in finished.stderr
    assert "prefill.sqnr_db" in finished.stderr
    assert json.loads(finished.stdout)["passed"]
